"""llama.cpp and vLLM, each in a process of its own: they may abort, and need other packages."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from adaskip.errors import ExportError

Name = Literal["llama.cpp", "vLLM"]
_CHILD = Path(__file__).with_name("engine_child.py")
# What vLLM needs on a CPU, in one process, with cores that it does not bind.
VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass(frozen=True)
class Settings:
    """How an engine runs a checkpoint.

    Attributes:
        engine: which one.
        model: a GGUF file for llama.cpp, a folder for vLLM.
        context: tokens that prompt and answer may have.
        python: of an environment that holds the engine: xllamacpp or vllm.
        threads: that compute.
        flash_attention: of llama.cpp, whether it may be used; logits of the dense model differ
            with it, too.
        exact: of llama.cpp, whether keys and values are in float32.
        dtype: of vLLM's computation.
        verbosity: of llama.cpp; 4 has it tell the sizes of its buffers.
    """

    engine: Name
    model: Path
    context: int
    python: str = sys.executable
    threads: int = 1
    flash_attention: bool = False
    exact: bool = True
    dtype: str = "float32"
    verbosity: int = 0

    def job(self) -> dict[str, Any]:
        """As `engine_child` reads them."""
        threads = {"OMP_NUM_THREADS": str(self.threads)}
        return {
            "engine": self.engine,
            "model": str(self.model),
            "context": self.context,
            "threads": self.threads,
            "flash_attention": self.flash_attention,
            "exact": self.exact,
            "dtype": self.dtype,
            "verbosity": self.verbosity,
            "environment": VLLM_ENVIRONMENT | threads,
        }


def version(engine: Name, python: str = sys.executable) -> str | None:
    """The package of an engine and its version, as `engine_child` tells them; None without it.

    Args:
        engine: which one.
        python: of the environment that holds it.
    """
    told = subprocess.run(  # noqa: S603 - our own program
        [python, "-P", str(_CHILD), engine], capture_output=True, text=True, check=False
    )
    return told.stdout or None


class Engine:
    """An engine with a checkpoint, as a context manager; it is asked request by request.

    Args:
        settings: which one, and how it runs.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed on leaving
        self._child = subprocess.Popen(  # noqa: S603 - our own program
            # -P: the folder of the program is no place to import from.
            [settings.python, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._send(settings.job())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._errors.close()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request, both as `engine_child` describes them.

        Raises:
            ExportError: the engine does not load the checkpoint, or stops.
        """
        self._send(request)
        assert self._child.stdout is not None  # noqa: S101 - a pipe
        line = self._child.stdout.readline()
        if not line:
            status = self._child.wait()
            said = [text for text in self.log().splitlines() if text.strip()] or ["nothing"]
            raise ExportError(
                f"{self.settings.engine} fails on {self.settings.model.name} (exit status "
                f"{status}): {said[-1]}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def log(self) -> str:
        """What the engine has printed."""
        self._errors.seek(0)
        return self._errors.read()

    def _send(self, content: Mapping[str, Any]) -> None:
        assert self._child.stdin is not None  # noqa: S101 - a pipe
        try:
            self._child.stdin.write(json.dumps(dict(content)) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            # It has ended; the next answer is missing and tells why.
            pass
