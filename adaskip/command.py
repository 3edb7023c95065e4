"""What every command line shares: one sentence per error, exit codes, one outlet for results."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from typing_extensions import override

from adaskip.errors import AdaskipError, did_you_mean

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
# As of a program that the closed pipe ends.
UNREAD = 141
# What an interrupted command leaves: rows and records, or nothing.
GOES_ON = "what is finished is kept; the same command goes on from there."
BEGINS_ANEW = "nothing is kept before its end; the same command begins anew."
_EXAMPLE = "example: "


class _Formatter(argparse.HelpFormatter):
    """Leaves an example on its line, so that it can be copied."""

    @override
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLE) else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """argparse that reports a bad option as every other bad input: in one sentence."""

    def __init__(self, prog: str | None = None, **settings: Any) -> None:
        script = sys.argv[0]
        own = f"python {script}" if script.endswith(".py") else None
        ours: dict[str, Any] = {"formatter_class": _Formatter, "allow_abbrev": False}
        super().__init__(prog or own, **(ours | settings))

    @override
    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuses a value that is no choice, and names the nearest that is."""
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            hint = did_you_mean(str(value), names)
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}.{hint} Choose one of: {', '.join(names)}."
            )

    @override
    def error(self, message: str) -> NoReturn:
        """Raises an `AdaskipError` in place of printing the usage."""
        unknown = message.partition("unrecognized arguments: ")[2].split()
        hint = did_you_mean(unknown[0], self._option_string_actions) if unknown else ""
        raise AdaskipError(f"{message}{hint and '.'}{hint} (see {self.prog} --help)")


@dataclass(frozen=True)
class Command:
    """One command line: its options, and what it does with them.

    Attributes:
        summary: what it does, in a sentence.
        options: adds its options to a parser.
        action: does it with the options that were given, and returns the exit code.
        example: options with which it works.
        kept: what is said of its work when it is interrupted.
    """

    summary: str
    options: Callable[[argparse.ArgumentParser], None]
    action: Callable[[argparse.Namespace], int]
    example: str
    kept: str = GOES_ON

    def parser(self, prog: str | None = None) -> Parser:
        """What parses it, called `prog`; by default as the script that was called."""
        example = f"{_EXAMPLE}%(prog)s {self.example}".rstrip()
        parser = Parser(prog=prog, description=self.summary, epilog=example)
        self.options(parser)
        return parser

    def main(self, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
        """Runs it on options, by default those of the command line; returns the exit code."""
        return guarded(lambda: self.action(self.parser(prog).parse_args(argv)), self.kept)


def launched_as_main() -> bool:
    """Whether this process may talk to the user; needs no connection."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str, end: str = "\n") -> None:
    """Prints a result, or a part of one: the command lines' one outlet."""
    if launched_as_main():
        with _while_somebody_reads():
            print(text, end=end, flush=True)  # noqa: T201 - what the user asked for goes to stdout


@contextmanager
def _while_somebody_reads() -> Iterator[None]:
    """Ends the program without a word where the output's reader, such as `head`, has gone."""
    try:
        yield
    except BrokenPipeError:
        # Or Python complains at its end, when it writes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(UNREAD)


def guarded(action: Callable[[], int], kept: str = BEGINS_ANEW) -> int:
    """Runs a command; returns its exit code, 2 for bad input, 130 for Ctrl-C.

    Args:
        action: what it does.
        kept: what is said of its work when it is interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a character shows a question mark in its place.
        sys.stdout.reconfigure(errors="replace")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("adaskip").setLevel(logging.INFO if launched_as_main() else logging.ERROR)
    # A command says itself what it skips; a run enters the block with every batch.
    logging.getLogger("adaskip.entering").setLevel(logging.WARNING)
    try:
        return action()
    except AdaskipError as error:
        sentence = " ".join(str(error).split())
        print(f"error: {sentence}", file=sys.stderr)  # noqa: T201 - see say()
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"interrupted: {kept}", file=sys.stderr)  # noqa: T201 - see say()
        return INTERRUPTED
    finally:
        with _while_somebody_reads():
            sys.stdout.flush()  # argparse's help
