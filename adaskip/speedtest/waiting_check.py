"""What it costs to let OpenMP's threads sleep while they wait: requests by turns, in processes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PreTrainedModel

from adaskip.errors import RunError
from adaskip.plan import Phase
from adaskip.profiling.calibration import random_prompt
from adaskip.profiling.interleaving import Ratio, by_turns
from adaskip.profiling.timing import Spread, growing_cache, time_request
from adaskip.speedtest.opening import open_model
from adaskip.speedtest.study import Content, Study
from adaskip.tables import markdown_table
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
_BUSY = "while True: pass"
# Of prefill, and per decode step.
Seconds = tuple[float, float]


def serve(options: str) -> None:
    """Runs in a process of its own: opens a model, then times a request per line of stdin.

    Args:
        options: as JSON: model, device, real, layers, context, n_steps.
    """
    given = json.loads(options)
    model = open_model(
        given["model"], given["device"], real=given["real"], n_layers=given["layers"]
    )
    ids = random_prompt(model, given["context"])
    for _ in sys.stdin:
        times = time_request(model, ids, given["n_steps"], make_cache=growing_cache)
        print(json.dumps([times.ttft, times.per_token]), flush=True)  # noqa: T201 - the answer


@contextmanager
def serving(setting: Mapping[str, str], options: str) -> Iterator[subprocess.Popen[str]]:
    """A process that serves, its threads waiting as a setting of `SETTINGS` says."""
    kept = {name: value for name, value in os.environ.items() if name not in (POLICY, SPINS)}
    path = os.pathsep.join(filter(None, [_ROOT, kept.get("PYTHONPATH")]))
    process = subprocess.Popen(  # noqa: S603 - this Python and the code above
        [sys.executable, "-c", _SERVE, options],
        env={**kept, "PYTHONPATH": path, **setting},
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


def measure_waiting(options: Mapping[str, Any], *, rounds: int, busy: int) -> dict[str, Any]:
    """Every setting by turns, against libgomp's default.

    Args:
        options: of `serve`.
        rounds: requests of each setting that count.
        busy: neighbours that compute all the time.
    """
    with ExitStack() as stack:
        text = json.dumps(dict(options))
        servers = {k: stack.enter_context(serving(v, text)) for k, v in SETTINGS.items()}
        kinds = {name: partial(request, server) for name, server in servers.items()}
        for warm_up in kinds.values():
            warm_up()
        stack.enter_context(neighbours(busy))
        title = f"{options['context']} tokens, {busy} busy"
        taken = list(by_turns(kinds, rounds=rounds, baselines=[BASELINE], title=title))
    rows = [_row(name, taken) for name in SETTINGS]
    return {"context": options["context"], "busy": busy, "rows": rows}


def _row(name: str, rounds: Sequence[Mapping[str, Sequence[Seconds]]]) -> dict[str, Any]:
    """Spreads of one setting, and its ratios to the baseline, round by round."""
    row: dict[str, Any] = {"label": name}
    for index, phase in enumerate(Phase):
        own, base = ([median(s[index] for s in r[k]) for r in rounds] for k in (name, BASELINE))
        row[str(phase)] = asdict(Spread.of(own)) | {"ratio": asdict(Ratio.paired(own, base))}
    return row


def _measure(model: PreTrainedModel, given: argparse.Namespace) -> Content:
    options = {"model": given.model, "real": given.real, "layers": given.layers}
    options |= {"device": str(model.device), "n_steps": given.new_tokens}
    points = [
        measure_waiting(options | {"context": context}, rounds=given.rounds, busy=busy)
        for context in given.contexts
        for busy in given.busy
    ]
    return {"points": points}


def _table(record: Mapping[str, Any]) -> str:
    """All context lengths, on a quiet and on a busy machine."""
    rows = []
    for point in record["points"]:
        for row in point["rows"]:
            cells = [row["label"], str(point["context"]), str(point["busy"])]
            for phase in Phase:
                own = row[str(phase)]
                spread = [1000 * own[key] for key in ("median", "q1", "q3")]
                cells += ["{:.1f} [{:.1f}–{:.1f}]".format(*spread), Ratio(**own["ratio"]).text(3)]
            rows.append(cells)
    header = ["waiting", "tokens", "busy", "prefill ms", "ratio", "ms/token", "ratio"]
    return markdown_table(header, rows)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--busy", type=int, nargs="+", default=[0], help="neighbours that compute all the time"
    )


WAITING = Study(
    name="waiting",
    description="What it costs to let OpenMP's threads sleep while they wait",
    contexts=(1024,),
    new_tokens=32,
    rounds=15,
    measure=_measure,
    table=_table,
    options=_options,
)
