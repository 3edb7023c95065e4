"""What every command line shares: one sentence per error, exit codes, one outlet for results."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Callable
from typing import NoReturn

from adaskip.errors import AdaskipError
from adaskip.models.processes import launched_as_main

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """argparse that reports a bad option as every other bad input: in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raises an `AdaskipError` in place of printing the usage."""
        raise AdaskipError(f"{message} (see {self.prog} --help)")


def say(text: str) -> None:
    """Prints a result: the command lines' one outlet."""
    if launched_as_main():
        print(text, flush=True)  # noqa: T201 - what the user asked for goes to stdout


def guarded(action: Callable[[], int]) -> int:
    """Runs a command; returns its exit code, 2 for bad input, 130 for Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a character shows a question mark in its place.
        sys.stdout.reconfigure(errors="replace")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("adaskip").setLevel(logging.INFO if launched_as_main() else logging.ERROR)
    try:
        return action()
    except AdaskipError as error:
        sentence = " ".join(str(error).split())
        print(f"error: {sentence}", file=sys.stderr)  # noqa: T201 - see say()
        return BAD_INPUT
    except KeyboardInterrupt:
        message = "interrupted: finished rows are kept; the same command continues."
        print(message, file=sys.stderr)  # noqa: T201 - see say()
        return INTERRUPTED
