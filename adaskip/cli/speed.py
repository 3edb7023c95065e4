"""The command lines of `speed/`: options from a measurement's fields, its record, its report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import Field, fields, replace
from typing import Any, TypeVar, get_args, get_type_hints

from adaskip.command import FAILED, Command, say
from adaskip.models.spec import model_names
from adaskip.reports.speed import as_markdown, draw
from adaskip.speedtest.benchmark import SpeedTest
from adaskip.speedtest.measurement import Measurement, measure
from adaskip.speedtest.record import key_id

M = TypeVar("M", bound=Measurement)


def speed_command(measurement: Measurement) -> Command:
    """What a script of `speed/` does, with its own defaults."""

    def options(parser: argparse.ArgumentParser) -> None:
        _add_options(parser, measurement)

    def action(given: argparse.Namespace) -> int:
        return _measure(_with(measurement, vars(given)))

    return Command(f"{measurement.title}.", options, action, "")


def speed_main(measurement: Measurement, argv: Sequence[str] | None = None) -> int:
    """What each script of `speed/` calls: measures what is missing, writes and prints the report.

    Args:
        measurement: with the script's own defaults.
        argv: the options, by default those of the command line.

    Returns:
        The exit code.
    """
    return speed_command(measurement).main(argv)


def _measure(measurement: Measurement) -> int:
    record = measure(measurement)
    text = as_markdown(measurement.kind, measurement.title, record.content)
    record.write_beside(".md", f"{text}\n".encode())
    written = [str(record.path), record.path.with_suffix(".md").name]
    figure = draw(record.content) if measurement.kind == "speed" else None
    if figure is not None:
        record.write_beside(".png", figure)
        written.append(record.path.with_suffix(".png").name)
    say(text)
    say(f"Written: {', '.join(written)}.")
    failed = [key_id(key) for key in record.missing(measurement.keys())]
    if failed:
        say(f"Out of memory, not measured: {'; '.join(failed)}. The same command tries it again.")
    return FAILED if failed else 0


def with_options(measurement: M, argv: Sequence[str] | None) -> M:
    """The measurement with the fields that a command line says.

    Raises:
        AdaskipError: an option is unknown or no such value.
    """
    return _with(measurement, vars(speed_command(measurement).parser().parse_args(argv)))


def _with(measurement: M, given: dict[str, Any]) -> M:
    lists = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    return replace(measurement, **(given | lists))


def _any_options(parser: argparse.ArgumentParser) -> None:
    """Those of `adaskip speed`, which also takes what a script has in its name."""
    parser.add_argument(
        "--model", dest="model_name", required=True, metavar="NAME", help=", ".join(model_names())
    )
    _add_options(parser, SpeedTest(model_name=""))


SPEED = Command(
    f"{SpeedTest.title}.",
    _any_options,
    lambda given: _measure(_with(SpeedTest(model_name=""), vars(given))),
    "--model smollm2 --weights default --contexts 512 --minutes 2",
)


def _add_options(parser: argparse.ArgumentParser, measurement: Measurement) -> None:
    """One option per field that has a help text."""
    hints = get_type_hints(type(measurement))
    for item in fields(measurement):
        if "help" in item.metadata:
            _add_option(parser, item, hints[item.name], getattr(measurement, item.name))


def _add_option(
    parser: argparse.ArgumentParser, item: Field[Any], hint: Any, default: object
) -> None:
    """One field: a flag, a value, or several values of one type."""
    settings: dict[str, Any] = {"default": default}
    text = item.metadata["help"]
    if hint is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        # The first of `tuple[int, ...]` and of `int | None`.
        settings["type"] = (get_args(hint) or (hint,))[0]
        shown = default
        if isinstance(default, tuple):
            settings["nargs"] = "+"
            shown = " ".join(map(str, default))
        if shown not in (None, ""):
            text += f" (default: {shown})"
    parser.add_argument(f"--{item.name}", help=text.replace("%", "%%"), **settings)
