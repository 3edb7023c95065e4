"""`adaskip completion`: what completes commands and options in a shell, made by shtab."""

from __future__ import annotations

import argparse

import shtab

from adaskip.cli.main import COMMANDS, PROG, command
from adaskip.cli.plan import ALL
from adaskip.command import BEGINS_ANEW, Command, say
from adaskip.methods import method_names
from adaskip.models.spec import model_names
from adaskip.policies import POLICIES
from adaskip.runs.runconfig import DENSE
from adaskip.search import MENU
from adaskip.tasks.spec import task_names

_FILES = frozenset(
    {"plan", "plans", "importance", "texts", "out", "file", "show", "html"}
    | {"config", "document", "readme", "tokenizer"}
)
_FOLDERS = frozenset({"results_dir", "data_dir", "model_path", "ship"})


def whole_parser() -> argparse.ArgumentParser:
    """One parser of all commands, whose names and files a shell completes; nothing is run by it."""
    whole = argparse.ArgumentParser(PROG)
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers()
    for name, entry in COMMANDS.items():
        parser = commands.add_parser(name, help=entry.does)
        command(name).options(parser)
        for action in parser._actions:
            _complete(action)
    return whole


def _complete(action: argparse.Action) -> None:
    """Says what an option's value may be, where the parser itself leaves names to be looked up."""
    names = {
        "model": model_names(),
        "model_name": model_names(),
        "policy": (DENSE, *POLICIES),
        "policies": tuple(POLICIES),
        "tasks": task_names(),
        "method": (ALL, *method_names()),
        "replacements": MENU,
    }
    if action.dest in names:
        action.choices = names[action.dest]
    elif action.dest in _FILES:
        action.complete = shtab.FILE  # type: ignore[attr-defined]  # how shtab is told
    elif action.dest in _FOLDERS:
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]  # how shtab is told


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="the shell it is for")


def _act(given: argparse.Namespace) -> int:
    say(shtab.complete(whole_parser(), given.shell))
    return 0


COMPLETION = Command(
    "Prints what completes commands, options and names in a shell. A shell gets it from its own "
    'start file: eval "$(adaskip completion bash)" in ~/.bashrc, eval "$(adaskip completion zsh)" '
    "behind compinit in ~/.zshrc; in fish: adaskip completion fish > "
    "~/.config/fish/completions/adaskip.fish.",
    _options,
    _act,
    "bash",
    BEGINS_ANEW,
)
