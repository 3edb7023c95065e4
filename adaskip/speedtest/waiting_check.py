"""What it costs to let OpenMP's threads sleep while they wait: requests by turns, in processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from adaskip.errors import RunError
from adaskip.profiling.calibration import random_prompt
from adaskip.profiling.interleaving import by_turns
from adaskip.profiling.timing import time_request
from adaskip.speedtest.measurement import Row, Seconds, Study, comparison, option
from adaskip.speedtest.record import Key, Point
from adaskip.waiting import POLICY, SPINS

# libgomp's own default is 300,000 spins, passive threads make none.
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {POLICY: "PASSIVE"},
    "1,000 spins": {SPINS: "1000"},
    "30,000 spins": {SPINS: "30000"},
}
BASELINE = "default"
_ROOT = str(Path(__file__).parents[2])
_SERVE = "import sys; from adaskip.speedtest.waiting_check import serve; serve(sys.argv[1])"
# Until its parent is gone, however that ended.
_BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@dataclass(frozen=True, kw_only=True)
class Waiting(Study):
    """How fast requests are when waiting threads spin, and when they sleep."""

    kind: ClassVar[str] = "waiting"
    title: ClassVar[str] = "What it costs to let OpenMP's threads sleep while they wait"
    free = Study.free | {"busy"}

    new_tokens: int = option(32, "decode steps per request")
    rounds: int = option(15, "requests of each kind that count")
    busy: tuple[int, ...] = option((0,), "neighbours that compute all the time")

    @override
    def keys(self) -> list[Key]:
        return [{"context": c, "busy": busy} for c in self.contexts for busy in self.busy]

    @override
    def points(self, missing: Sequence[Key]) -> Iterator[Point]:
        for key in missing:
            yield {"rows": measure_waiting(self, key["context"], key["busy"])}


def serve(options: str) -> None:
    """Runs in a process of its own: opens a model, then times a request per line of stdin.

    Args:
        options: as JSON: the fields of the `Waiting` whose requests these are, its contexts one.
    """
    study = Waiting(**json.loads(options))
    model = study.open()
    ids = random_prompt(model, study.contexts[0])
    for _ in sys.stdin:
        times = time_request(model, ids, study.new_tokens)
        print(json.dumps([times.ttft, times.per_token]), flush=True)  # noqa: T201 - the answer


@contextmanager
def serving(setting: Mapping[str, str], options: str) -> Iterator[subprocess.Popen[str]]:
    """A process that serves, its threads waiting as a setting of `SETTINGS` says."""
    others = {name: value for name, value in os.environ.items() if name not in (POLICY, SPINS)}
    path = os.pathsep.join(filter(None, [_ROOT, others.get("PYTHONPATH")]))
    process = subprocess.Popen(  # noqa: S603 - this Python and the code above
        [sys.executable, "-c", _SERVE, options],
        env={**others, "PYTHONPATH": path, **setting},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def request(process: subprocess.Popen[str]) -> Seconds:
    """One request in a serving process.

    Raises:
        RunError: the process has ended; it has said why.
    """
    assert process.stdin and process.stdout  # noqa: S101, PT018 - both are pipes
    with suppress(BrokenPipeError):  # it has ended: there is no answer either
        process.stdin.write("\n")
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RunError("A process that times requests has ended; its message is above.")
    ttft, per_token = json.loads(answer)
    return float(ttft), float(per_token)


@contextmanager
def neighbours(number: int) -> Iterator[None]:
    """So many other processes that never wait."""
    busy = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(number)]  # noqa: S603
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure_waiting(study: Waiting, context: int, busy: int) -> list[Row]:
    """Every setting by turns, against libgomp's default.

    Args:
        study: the model, and how often it is timed.
        context: prompt tokens.
        busy: neighbours that compute all the time.
    """
    options = json.dumps(asdict(replace(study, contexts=(context,))))
    with ExitStack() as stack:
        servers = {k: stack.enter_context(serving(v, options)) for k, v in SETTINGS.items()}
        kinds = {name: partial(request, server) for name, server in servers.items()}
        for warm_up in kinds.values():
            warm_up()
        stack.enter_context(neighbours(busy))
        title = f"{context} tokens, {busy} busy"
        taken = list(by_turns(kinds, rounds=study.rounds, baselines=[BASELINE], title=title))
    return [comparison(taken, name, BASELINE) for name in SETTINGS]
