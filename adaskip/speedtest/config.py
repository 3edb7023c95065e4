"""What a speed test measures: a frozen value from which its command line follows."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from adaskip.cli.command import Parser, guarded, say
from adaskip.errors import AdaskipError, refuse_below_one
from adaskip.policies import POLICIES, policy_class
from adaskip.profiling.interleaving import MIN_ROUNDS

DEFAULT_WEIGHTS = "default"


def _all_policies() -> tuple[str, ...]:
    """Those that skip whole layers first."""
    return tuple(sorted(POLICIES, key=lambda name: POLICIES[name].budget))


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """What a speed test measures; see `python speed/run_smollm2_speed.py --help`.

    Attributes:
        weights: None for random ones, "default" for the model's own, else a folder or hub id.
        budgets: in sublayers.
        minutes: about how long it may take in all, the same for every point. A point takes at
            least `MIN_ROUNDS` rounds, and one to warm up.
    """

    model_name: str
    weights: str | None = None
    contexts: tuple[int, ...] = (512, 1024, 2048, 4096)
    batches: tuple[int, ...] = (1,)
    policies: tuple[str, ...] = field(default_factory=_all_policies)
    budgets: tuple[int, ...] = (4, 8, 16)
    new_tokens: int = 16
    rounds: int = 15
    minutes: float = 10.0
    compiled: bool = False
    keep_memory: bool = True
    layers: int | None = None
    dtype: str | None = None
    device: str | None = None
    allow_pickle: bool = False
    name: str = ""
    results_dir: str = "results/speed"
    resume: bool = True

    def settings(self) -> dict[str, Any]:
        """What points of one table must have in common."""
        free = (
            *("contexts", "batches", "rounds", "minutes"),
            *("name", "results_dir", "resume", "allow_pickle"),
        )
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if key not in free
        }

    def check(self) -> None:
        """Refuses numbers that cannot be measured.

        Raises:
            AdaskipError: the first one.
        """
        numbers = {"new_tokens": self.new_tokens, "rounds": self.rounds}
        numbers |= {"contexts": min(self.contexts), "batches": min(self.batches)}
        refuse_below_one(numbers)
        for name in self.policies:
            policy_class(name)
        if not 0 <= self.minutes < math.inf:
            raise AdaskipError(f"--minutes is {self.minutes}; it must be a number, 0 or more.")


_HELP = {
    "weights": "real weights: 'default' for the model's own, or a folder or hub id (default: "
    "random ones of its shape, nothing is downloaded)",
    "contexts": "prompt lengths in tokens",
    "batches": "batch sizes",
    "policies": "policies to measure",
    "budgets": "sublayers to skip; policies that count whole layers skip half as many",
    "new_tokens": "decode steps per request",
    "rounds": "requests per case at most",
    "minutes": f"about how long to measure; a point takes {MIN_ROUNDS} rounds at least",
    "compiled": "also measure compiled decoding on a static cache",
    "keep_memory": "keep freed memory in the process (CPU): no page faults within the times",
    "layers": "decoder layers, where the whole model is too large (random weights only)",
    "dtype": "float32, bfloat16 or float16 (default: bfloat16 on CUDA, else float32)",
    "device": "torch device (default: cuda where there is one, else cpu)",
    "allow_pickle": "also read weights from .bin files: pickles, of which torch reads tensors only",
    "name": "name of the record (default: MODEL-DEVICE)",
    "results_dir": "folder of the records",
    "resume": "continue a record that exists",
}
_NUMBERS = {"contexts", "batches", "budgets", "new_tokens", "rounds", "layers"}


def add_speed_options(parser: argparse.ArgumentParser, defaults: SpeedConfig) -> None:
    """One option per field of `SpeedConfig`."""
    for key, default in asdict(defaults).items():
        if key not in _HELP:
            continue
        settings: dict[str, Any] = {"default": default}
        text = _HELP[key]
        if isinstance(default, bool):
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = int if key in _NUMBERS else float if key == "minutes" else str
            if isinstance(default, tuple):
                settings["nargs"] = "+"
                text += f" (default: {' '.join(map(str, default))})"
            elif default not in (None, ""):
                text += f" (default: {default})"
        parser.add_argument(f"--{key}", help=text, **settings)


def speed_main(model_name: str, argv: Sequence[str] | None = None, **defaults: Any) -> int:
    """What `speed/run_llama_speed.py` and its like call; returns the exit code.

    Args:
        model_name: a name of `configs/models.yaml`.
        argv: the options, by default those of the command line.
        defaults: other defaults for this model.
    """

    def action() -> int:
        parser = Parser(
            description=f"Times prefill and decode of {model_name}, dense and with sublayers "
            "skipped; writes JSON, a table and a figure.",
            allow_abbrev=False,
        )
        add_speed_options(parser, SpeedConfig(model_name=model_name, **defaults))
        given = vars(parser.parse_args(argv))
        lists = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
        config = SpeedConfig(model_name=model_name, **(given | lists))
        from adaskip.reports.speed import write_speed_report
        from adaskip.speedtest.benchmark import run_speed

        path = run_speed(config)
        say(write_speed_report(path))
        say(f"Written: {path}, {path.with_suffix('.md').name} and {path.with_suffix('.png').name}.")
        return 0

    return guarded(action)
