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
    for folder in _config_folders():
        if (folder / name).is_file():
            return folder / name
    raise AdaskipError(f"No configuration file {name!r} beside the adaskip package; reinstall it.")


def config_names() -> list[str]:
    """The names of all configuration files, without `.yaml`."""
    return sorted({path.stem for folder in _config_folders() for path in folder.glob("*.yaml")})


def _config_folders() -> tuple[Path, Path]:
    package = Path(__file__).parent
    return package / "configs", package.parent / "configs"


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
