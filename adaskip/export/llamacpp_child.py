"""Runs a GGUF file in llama.cpp; a program of its own, which imports nothing of adaskip.

Reads a JSON object from its input: `model` (a path), `context`, `threads`, `flash_attention`,
`exact` (KV in float32) and `requests`, each with `ids` and `n_new`. Writes to the file in its first
argument, as JSON lines, per request what llama.cpp answers: `tokens`, `timings`, and for each new
token `n_probs` log-probabilities by id. They are lost where the new token is no whole character;
`forced` makes it one that is.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


def server(job: dict[str, Any]) -> Any:
    """llama.cpp with the model loaded, on the CPU."""
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx = job["context"]
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.fit_params = False
    params.warmup = job.get("warmup", False)
    params.verbosity = job.get("verbosity", 0)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    kinds = xllamacpp.llama_flash_attn_type
    if not job["flash_attention"]:
        params.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if job["exact"]:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def answer(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """One greedy answer."""
    body = {
        "prompt": request["ids"],
        "n_predict": request["n_new"],
        "n_probs": request.get("n_probs", 0),
        "temperature": 0,
        "top_k": 1,
        "return_tokens": True,
        "cache_prompt": request.get("cache_prompt", False),
        "ignore_eos": request.get("ignore_eos", False),
    }
    if "forced" in request:
        # What is told are log-probabilities without this.
        body["logit_bias"] = [[request["forced"], 1e5]]
    call = urllib.request.Request(  # noqa: S310 - our own server
        f"{engine.listening_address}/completion",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(call) as reply:  # noqa: S310 - our own server
        told = json.load(reply)
    found = {"tokens": told["tokens"], "timings": told["timings"]}
    if body["n_probs"]:
        found["log_probs"] = [
            {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}
            for token in told["completion_probabilities"]
        ]
    return found


def main() -> None:
    """Answers all requests of the job."""
    job = json.load(sys.stdin)
    engine = server(job)
    with Path(sys.argv[1]).open("w", encoding="utf-8") as out:
        for request in job["requests"]:
            out.write(json.dumps(answer(engine, request)) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
