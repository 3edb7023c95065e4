"""The command `adaskip`: one word for each thing it does, each as thin as a script.

A new one is a `Command` in a module here and a row in `COMMANDS`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from adaskip.cli.starting import begin

if TYPE_CHECKING:
    from adaskip.command import Command

PROG = "adaskip"


class Entry(NamedTuple):
    """Where a `Command` is, as `module:name`; what it does in a few words; the extra it needs."""

    home: str
    does: str
    extra: str | None = None


COMMANDS = {
    "chat": Entry("adaskip.cli.chat:CHAT", "talk to a model, dense or with sublayers skipped"),
    "learn": Entry("adaskip.cli.learn:LEARN", "learn which sublayers of a model matter"),
    "plan": Entry("adaskip.cli.plan:PLAN", "make plans by a search or by the field's methods"),
    "run": Entry("adaskip.cli.run:RUN", "run one experiment under one policy"),
    "export": Entry(
        "adaskip.export.command_line:EXPORT", "write a plan as a checkpoint of its own"
    ),
    "score": Entry("adaskip.cli.run:SCORE", "score a run beside its dense one"),
    "perplexity": Entry(
        "adaskip.cli.perplexity:PERPLEXITY", "perplexity of reference answers", "experiments"
    ),
    "sweep": Entry(
        "adaskip.sweep:SWEEP", "run many experiments and write their report", "experiments"
    ),
    "needle": Entry(
        "adaskip.cli.needle:NEEDLE", "a needle's depth against context length", "experiments"
    ),
    "leaderboard": Entry(
        "adaskip.cli.leaderboard:LEADERBOARD",
        "methods beside each other at equal time",
        "experiments",
    ),
    "observe": Entry(
        "adaskip.cli.observe:OBSERVE", "the paper's observations on a model", "experiments"
    ),
    "speed": Entry("adaskip.cli.speed:SPEED", "time prefill and decode", "experiments"),
    "env": Entry("adaskip.cli.env:ENV", "versions, device and attention, for a report"),
    "completion": Entry("adaskip.cli.completion:COMPLETION", "what completes these in a shell"),
}
# Modules that a command of an extra loads, sooner or later.
EXTRAS = {"experiments": ("jinja2", "matplotlib", "pandas", "PIL")}


def main() -> int:
    """Runs the command that the command line names; returns its exit code."""
    begin(only_parses=sys.argv[1:2] == ["completion"])
    from adaskip.command import guarded

    return guarded(lambda: run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Runs a command: its name, then its options.

    Raises:
        AdaskipError: there is no such command, or a package that it needs is missing.
    """
    from adaskip.command import say

    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        say(overview())
        return 0
    if name == "--version":
        from adaskip.version import __version__

        say(f"{PROG} {__version__}")
        return 0
    return command(name).main(argv[1:], prog=f"{PROG} {name}")


def command(name: str) -> Command:
    """The command of this name.

    Raises:
        AdaskipError: there is none, or a package that it needs is missing.
    """
    from adaskip.errors import AdaskipError, unknown_name

    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    home, _, extra = COMMANDS[name]
    for module in EXTRAS.get(extra or "", ()):
        # Before anything is computed, not when its figure is drawn.
        if find_spec(module) is None:
            raise AdaskipError(
                f"{PROG} {name} needs the package {module}, which is not installed; install it "
                f"with: pip install 'adaskip[{extra}]'"
            )
    module, _, attribute = home.partition(":")
    found: Command = getattr(import_module(module), attribute)
    return found


def overview() -> str:
    """What `adaskip --help` prints."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {entry.does}" for name, entry in COMMANDS.items())
    return (
        f"usage: {PROG} COMMAND [options]\n\n"
        "Skips the attention and FFN sublayers of a language model that matter least.\n\n"
        f"commands:\n{rows}\n\n"
        f"`{PROG} COMMAND --help` lists a command's options and shows an example.\n"
        f"example: {PROG} chat --model smollm2 --policy ADA --skip_sub_layer_num 8 --compare"
    )
