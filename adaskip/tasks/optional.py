"""Optional modules: imported when they are needed, missing ones named with what to install."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

from adaskip.errors import AdaskipError


def optional_module(name: str, distribution: str) -> ModuleType:
    """Import a module that only runs and their scores need, keeping its import-time warnings quiet.

    Args:
        name: what to import, e.g. `"rouge_score.rouge_scorer"`.
        distribution: what to install for it, e.g. `"rouge-score"`.

    Raises:
        AdaskipError: it, or a package it needs, is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).partition(".")[0]
        own = missing == name.partition(".")[0]
        what = "is" if own else f"needs the module {missing}, which is"
        raise AdaskipError(
            f"The package {distribution} {what} not installed; install it with: pip install "
            f"{distribution}, or all that runs and scores need: pip install 'adaskip[experiments]'"
        ) from error
