"""What the small speed scripts share: the options, the model, the record and its table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from adaskip.cli.command import Parser, guarded, say
from adaskip.errors import refuse_below_one
from adaskip.models.loading import model_names
from adaskip.profiling.calibration import hardware
from adaskip.runs.files import SCHEMA, environment, write_json, write_text
from adaskip.speedtest.opening import open_model

Content = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A measurement on one model that a single command makes.

    Attributes:
        name: of its record: `<name>-<model>-<device>`.
        description: what `--help` says it is.
        contexts: prompt lengths, by default.
        new_tokens: decode steps per request, by default.
        rounds: requests of each kind, by default.
        measure: what to write into the record, from the model and the options.
        table: that as a markdown table.
        options: adds options of its own.
    """

    name: str
    description: str
    contexts: Sequence[int]
    new_tokens: int
    rounds: int
    measure: Callable[[PreTrainedModel, argparse.Namespace], Content]
    table: Callable[[Mapping[str, Any]], str]
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def study_main(study: Study, argv: Sequence[str] | None = None) -> int:
    """What a script calls: measures, writes `.json` and `.md`, prints; returns the exit code."""

    def action() -> int:
        given = _parser(study).parse_args(argv)
        numbers = {"contexts": min(given.contexts), "new_tokens": given.new_tokens}
        refuse_below_one(numbers | {"rounds": given.rounds})
        model = open_model(given.model, given.device, real=given.real, n_layers=given.layers)
        record = {
            "schema": SCHEMA,
            "settings": vars(given) | {"hardware": hardware(model.device)},
            "environment": environment(model.device.type),
            **study.measure(model, given),
        }
        path = Path(given.results_dir) / f"{study.name}-{given.model}-{model.device.type}.json"
        write_json(path, record)
        text = as_markdown(study, record)
        write_text(path.with_suffix(".md"), text + "\n")
        say(text)
        return 0

    return guarded(action)


def as_markdown(study: Study, record: Mapping[str, Any]) -> str:
    """The table with what it was measured on."""
    settings, made_in = record["settings"], record["environment"]
    weights = "its own" if settings["real"] else "random"
    about = (
        f"{settings['model']}, {weights} weights, {settings['hardware']}; "
        f"torch {made_in['torch']}, transformers {made_in['transformers']}; "
        f"{settings['rounds']} rounds of requests with {settings['new_tokens']} decode steps; "
        f"commit {made_in['commit']}. Ratios are medians over rounds with their 95 % interval "
        "(docs/SPEED.md)."
    )
    return "\n\n".join([f"# {study.description}", about, study.table(record)])


def _parser(study: Study) -> Parser:
    parser = Parser(description=f"{study.description}.", allow_abbrev=False)
    parser.add_argument("--model", default="smollm2", choices=model_names(), help="the shape")
    parser.add_argument("--real", action="store_true", help="real weights in place of random ones")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[*study.contexts], help="prompt lengths"
    )
    parser.add_argument(
        "--new_tokens", type=int, default=study.new_tokens, help="decode steps per request"
    )
    parser.add_argument(
        "--rounds", type=int, default=study.rounds, help="requests of each kind that count"
    )
    parser.add_argument("--layers", type=int, help="decoder layers (random weights)")
    parser.add_argument("--device", help="torch device")
    parser.add_argument("--results_dir", default="results/speed")
    study.options(parser)
    return parser
