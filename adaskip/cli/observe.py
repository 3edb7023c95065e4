"""The command lines of `observations/`: several models in one figure, nothing measured twice."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, cast

from adaskip.cli.command import Parser, guarded, say
from adaskip.cli.run import add_run_options
from adaskip.configuration import read_config
from adaskip.errors import AdaskipError
from adaskip.models.processes import team
from adaskip.models.spec import model_spec
from adaskip.observing.analysis import VIEWS, stand_in
from adaskip.reports.observation_figures import Panel, draw
from adaskip.runs.files import SCHEMA, environment, write_json, write_text
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.runner import resolve
from adaskip.sweep import ModelSlot as Benches
from adaskip.tables import markdown_table

FACTS = "observations.yaml"
DATA_OPTIONS = (
    *("tasks", "limit", "model_path", "data_dir", "longbench_e", "min_length", "sample_tokens"),
    *("max_length", "dtype", "device", "allow_pickle", "seed", "results_dir"),
)
# Of one model: its part of the JSON, its panels in rows, and the text to print.
Part = tuple[dict[str, Any], list[Panel], str]


class _Chosen:
    """Passes on to a parser those run options alone that have one of the given names."""

    def __init__(self, parser: argparse.ArgumentParser, names: Collection[str]) -> None:
        self._parser = parser
        self._names = names

    def add_argument(self, *flags: str, **settings: Any) -> None:
        if settings["dest"] in self._names:
            self._parser.add_argument(*flags, **settings)


def add_options(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """Adds the run options of these names."""
    add_run_options(cast(argparse.ArgumentParser, _Chosen(parser, names)))


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

    def action() -> int:
        parser = _parser(observation)
        given = vars(parser.parse_args(argv))
        models: list[str] = list(dict.fromkeys(given.pop("model")))
        if given["model_path"] and len(models) > 1:
            raise AdaskipError("--model_path replaces the weights of one model; give one --model.")
        scores = given.pop("scores", False)
        configs = [configured(observation, model, given) for model in models]
        benches = Benches()
        parts = {c.run_name: _PARTS[observation](c, benches, scores) for c in configs}
        team().on_main(lambda: _write(observation, configs, models, parts))
        return 0

    return guarded(action)


def _parser(observation: str) -> Parser:
    parser = Parser(description=f"{_TITLES[observation]}.", allow_abbrev=False)
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        metavar="NAME",
        help="llama, internlm, vicuna, smollm2, a folder or a hub id; one panel each",
    )
    add_options(parser, DATA_OPTIONS)
    parser.set_defaults(results_dir="results/observations")
    if observation == "ob0":
        parser.add_argument(
            "--scores", action="store_true", help="also generate answers and score them"
        )
    return parser


def _write(
    observation: str, configs: Sequence[RunConfig], models: Sequence[str], parts: dict[str, Part]
) -> None:
    """JSON, figure and text of all models together."""
    config = configs[0]
    folder = Path(config.results_dir)
    stem = f"{observation}-{'-'.join(parts)}"
    content = {
        "schema": SCHEMA,
        "observation": _TITLES[observation],
        "command": f"python observations/{observation}.py --model {' '.join(models)}",
        "settings": config.settings(),
        "environment": environment(str(config.device)),
        "models": {name: part[0] for name, part in parts.items()},
    }
    write_json(folder / f"{stem}.json", content)
    text = "\n\n".join(
        f"**{each.run_name}**{_stand_ins(observation, each)}\n\n{part[2]}"
        for each, part in zip(configs, parts.values(), strict=True)
    )
    write_text(folder / f"{stem}.md", f"# {_TITLES[observation]}\n\n{text}\n")
    columns = [part[1] for part in parts.values()]
    wide = observation in ("ob0", "stability")
    # One model's many panels stand in two columns; several models each have a column of their own.
    if len(columns) == 1 and wide:
        panels = columns[0]
        rows = [panels[start : start + 2] for start in range(0, len(panels), 2)]
        draw(rows, folder / f"{stem}.png", width=4.6)
    else:
        rows = [list(row) for row in zip(*columns, strict=True)]
        draw(rows, folder / f"{stem}.png", width=7.0 if len(columns) == 1 else 4.6)
    say(f"{text}\n\nWritten: {folder / stem}.json, .md and .png.")


def _stand_ins(observation: str, config: RunConfig) -> str:
    """Says which offline tasks stand in for LongBench's."""
    pairs = [(task, stand_in(observation, task)) for task in config.tasks]
    said = [f"{task} stands in for {other}" for task, other in pairs if other is not None]
    return f" (offline sample: {', '.join(said)})" if said else ""


def _view_part(observation: str) -> Callable[[RunConfig, Benches, bool], Part]:
    def part(config: RunConfig, benches: Benches, scores: bool) -> Part:
        from adaskip.observing.recording import observe_task

        view = VIEWS[observation]
        seen = [observe_task(config, task, benches.get) for task in config.tasks]
        return view.as_json(seen), view.panels(config.run_name, seen), view.text(seen)

    return part


def _ob0_part(config: RunConfig, benches: Benches, scores: bool) -> Part:
    from adaskip.observing.layer_skipping import (
        as_json,
        choices,
        layer_similarity,
        measure,
        panels,
        table,
    )
    from adaskip.observing.recording import observe_task

    content = read_config(FACTS)
    seen = [observe_task(config, task, benches.get) for task in config.tasks]
    similarity = layer_similarity(seen)
    made = choices(similarity, content["skipped_layers"])
    few = dataclasses.replace(config, limit=config.limit or content["perplexity_rows"])
    found = {t: measure(few, t, made, benches.get, scores=scores) for t in config.tasks}
    result = as_json(made, found) | {"similarity": [round(s, 7) for s in similarity]}
    return result, panels(config.run_name, made, found), table(made, found)


def _stability_part(config: RunConfig, benches: Benches, scores: bool) -> Part:
    from adaskip.observing.recording import observe_requests
    from adaskip.observing.stability import panels, stability

    content = read_config(FACTS)
    counts, budgets = content["warmup_prompts"], content["chosen_sublayers"]
    config = dataclasses.replace(config, limit=max(counts))
    requests = {t: observe_requests(config, t, benches.get, max(counts)) for t in config.tasks}
    report = stability(requests, counts, budgets, config.seed)
    lines = [
        [f"{task}, {n} prompts", *(_interval(by_n[n]) for by_n in found.values())]
        for task, found in report["by_prompts"].items()
        for n in map(str, counts)
    ]
    for pair in next(iter(report["between_tasks"].values())):
        each = (found[pair] for found in report["between_tasks"].values())
        lines.append([pair, *map(_interval, each)])
    header = ["share of the same sublayers", *(f"{n} chosen" for n in budgets)]
    return report, panels(config.run_name, report), markdown_table(header, lines)


def _interval(found: dict[str, float]) -> str:
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


_PARTS: dict[str, Callable[[RunConfig, Benches, bool], Part]] = {
    "ob0": _ob0_part,
    "ob1": _view_part("ob1"),
    "ob2": _view_part("ob2"),
    "ob3": _view_part("ob3"),
    "stability": _stability_part,
}
_TITLES = {
    "ob0": "Skipping the layers of highest and of lowest IO similarity",
    "ob1": "Observation 1: the IO similarity of whole layers",
    "ob2": "Observation 2: the IO similarity of attention and of FFN sublayers",
    "ob3": "Observation 3: the IO similarity in prefill and in decode",
    "stability": "How stable the chosen sublayers are",
}
