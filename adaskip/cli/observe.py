"""The command lines of `observations/`: several models in one figure, nothing measured twice."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaskip.cli.run import add_run_options, as_words
from adaskip.command import Command, say
from adaskip.configuration import read_config
from adaskip.errors import AdaskipError
from adaskip.models.processes import team
from adaskip.models.spec import model_names, model_spec, refuse_namesakes
from adaskip.observing.analysis import Numbers, observed
from adaskip.observing.layer_skipping import skip_layers
from adaskip.observing.recording import OpenModel
from adaskip.observing.stability import measured_stability
from adaskip.reports.observations import TITLES, write_observation
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.runner import resolve
from adaskip.sweep import ModelSlot

FACTS = "observations.yaml"
RESULTS = "results/observations"
DATA_OPTIONS = (
    *("tasks", "limit", "model_path", "data_dir", "longbench_e", "min_length", "sample_tokens"),
    *("max_length", "dtype", "device", "allow_pickle", "seed", "results_dir"),
)


def facts(observation: str, model: str) -> tuple[str, ...]:
    """The tasks of an observation for a model: the paper's, or the offline sample's."""
    offline = model in read_config("budgets.yaml")["offline_models"]
    return tuple(read_config(FACTS)[observation]["sample_tasks" if offline else "tasks"])


def configured(observation: str, model: str, given: dict[str, Any]) -> RunConfig:
    """The resolved configuration of one model, nothing skipped.

    Raises:
        AdaskipError: an option is wrong, or the model or a task unknown.
    """
    model_spec(model)
    tasks = tuple(given["tasks"]) or facts(observation, model)
    settings = given | {"tasks": tasks, "name": label(model)}
    settings.setdefault("policy", "dense")
    return resolve(RunConfig(experiment="e2e", model_name=model, **settings))


def label(model: str) -> str:
    """How files and figures call a model: a folder or hub id by its last part."""
    return Path(model).name


def observation_main(observation: str, argv: Sequence[str] | None = None) -> int:
    """What `observations/ob1.py` and its like call.

    Args:
        observation: "ob0" to "ob3", or "stability".
        argv: the options, by default those of the command line.

    Returns:
        The exit code.
    """

    def options(parser: argparse.ArgumentParser) -> None:
        _options(parser)
        if observation == "ob0":
            _add_scores(parser)

    def action(given: argparse.Namespace) -> int:
        return _observe(observation, vars(given), f"python observations/{observation}.py")

    summary = f"{TITLES[observation]}."
    return Command(summary, options, action, "--model smollm2").main(argv)


def _observe(observation: str, given: dict[str, Any], command: str) -> int:
    """Measures the models that are asked for, and writes what was found."""
    models: list[str] = list(dict.fromkeys(given.pop("model")))
    refuse_namesakes(models)
    if given["model_path"] and len(models) > 1:
        raise AdaskipError("--model_path replaces the weights of one model; give one --model.")
    scores = given.pop("scores", False)
    if scores and observation != "ob0":
        raise AdaskipError(f"--scores belongs to ob0, not to {observation}: leave it out.")
    words = [*command.split(), "--model", *models, *as_words(given, results_dir=RESULTS)]
    command = shlex.join([*words, "--scores"] if scores else words)
    configs = [configured(observation, model, given) for model in models]
    open_model = ModelSlot().get
    found = {c.run_name: _measured(observation, c, open_model, scores) for c in configs}
    say(team().on_main(lambda: write_observation(observation, command, configs, found)))
    return 0


def _measured(observation: str, config: RunConfig, open_model: OpenModel, scores: bool) -> Numbers:
    """The numbers of one model."""
    if observation == "ob0":
        return skip_layers(config, open_model, scores=scores)
    if observation == "stability":
        return measured_stability(config, open_model)
    return observed(observation, config, open_model)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        metavar="NAME",
        help=f"{', '.join(model_names())}, a folder or a hub id; one panel each",
    )
    add_run_options(parser, DATA_OPTIONS, results_dir=RESULTS)


def _add_scores(parser: argparse.ArgumentParser) -> None:
    text = "also generate answers and score them (ob0)"
    parser.add_argument("--scores", action="store_true", help=text)


def _any_options(parser: argparse.ArgumentParser) -> None:
    """Those of `adaskip observe`, which also takes what a script has in its name."""
    listed = "; ".join(f"{name}: {title[0].lower()}{title[1:]}" for name, title in TITLES.items())
    parser.add_argument("observation", metavar="OBSERVATION", choices=[*TITLES], help=listed)
    _options(parser)
    _add_scores(parser)


def _any(given: argparse.Namespace) -> int:
    options = vars(given)
    observation = options.pop("observation")
    return _observe(observation, options, f"adaskip observe {observation}")


OBSERVE = Command(
    "The paper's observations on a model, and how stable the chosen sublayers are.",
    _any_options,
    _any,
    "ob2 --model smollm2 --limit 2",
)
