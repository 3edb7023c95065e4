"""Where things lie: the facts in `configs/`, and the folder for what is made once and kept."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

from adaskip.errors import AdaskipError


def config_path(name: str) -> Path:
    """The path of `configs/<name>`, in an installed wheel or in a checkout.

    Raises:
        AdaskipError: there is no such file.
    """
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise AdaskipError(f"No configuration file {name!r} beside the adaskip package; reinstall it.")


@cache
def read_config(name: str) -> dict[str, Any]:
    """The parsed content of the YAML file `configs/<name>`; read once, not to be changed."""
    if (
        importlib.util.find_spec("yaml") is None
    ):  # pragma: no cover - PyYAML comes with transformers
        raise AdaskipError("PyYAML is needed to read configs/: pip install pyyaml.")
    import yaml

    content: dict[str, Any] = yaml.safe_load(config_path(name).read_text(encoding="utf-8"))
    return content


def cache_root() -> Path:
    """`$ADASKIP_CACHE`, else `$XDG_CACHE_HOME/adaskip`, else `~/.cache/adaskip`."""
    if own := os.environ.get("ADASKIP_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "adaskip"
