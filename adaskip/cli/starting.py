"""How a command starts: how its threads wait, and `--help` without loading what computes.

Loading torch and transformers takes seconds, which `--help` does not need: it prints names, types
and defaults. Where nothing but help is asked for, placeholders therefore take the place of the
heavy packages while our modules are loaded, and the parser that prints is the one that parses.
"""

from __future__ import annotations

import inspect
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, TracebackType
from typing import Any, NoReturn

from adaskip.waiting import wait_briefly

HEAVY = frozenset(
    {"accelerate", "datasets", "gguf", "matplotlib", "numpy", "pandas", "PIL", "safetensors"}
    | {"scipy", "tokenizers", "torch", "transformers"}
)
_HELP = frozenset({"-h", "--help"})
# Set for the second try of a command whose modules could not be loaded with placeholders.
_LOADS = "ADASKIP_HELP_LOADS"


def begin(*, only_parses: bool = False) -> None:
    """For a program's first call, before it imports what loads torch.

    Args:
        only_parses: the command computes nothing, as `--help` does.
    """
    wait_briefly()
    asked = only_parses or not _HELP.isdisjoint(sys.argv[1:])
    if asked and _LOADS not in os.environ and HEAVY.isdisjoint(sys.modules):
        sys.meta_path.insert(0, _Placeholders())
        sys.excepthook = _again


def _again(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> NoReturn:
    """Starts the program again: a module computes while it is loaded, so help has to be slow."""
    os.environ[_LOADS] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - this very program


class _Placeholder:
    """Has all attributes, can be called, indexed and subclassed; as a decorator changes nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        decorated = len(args) == 1 and inspect.isroutine(args[0])
        return args[0] if decorated else self

    def __getitem__(self, key: object) -> Any:
        return self

    def __or__(self, other: object) -> Any:
        return self

    __ror__ = __or__

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type, ...]:
        return ()


class _Module(ModuleType):
    """A module of placeholders."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder()


class _Placeholders(MetaPathFinder, Loader):
    """Finds modules of the heavy packages: one of placeholders, whatever its name."""

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        """A module within a heavy package; None for all others."""
        heavy = fullname.partition(".")[0] in HEAVY
        return ModuleSpec(fullname, self, is_package=True) if heavy else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module that has everything."""
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Runs nothing."""
