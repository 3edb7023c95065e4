"""Where something was measured: versions, code, device, and what computes attention."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
# What scores depend on besides the code here. fuzzywuzzy compares otherwise where Levenshtein is.
METRIC_PACKAGES = ("rouge", "rouge-score", "fuzzywuzzy", "Levenshtein", "jieba")
# What several environments differ in is told with this between.
_BETWEEN = " / "


def environment(device: str, attention: str | None = None) -> dict[str, Any]:
    """Versions, code and hardware behind a run, ready for JSON.

    Args:
        device: what computes, e.g. "cpu" or "cuda:0".
        attention: the implementation that the model at hand uses; by default those that this
            installation offers, which transformers chooses from.
    """
    import torch

    from adaskip.version import __version__

    on_cuda = device.startswith("cuda") and torch.cuda.is_available()
    return {
        "adaskip": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "attention": attention or attention_implementations(),
        "metrics": {name: installed_version(name) for name in METRIC_PACKAGES},
        "commit": git_commit(),
    }


def joined(environments: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What was measured in several environments; where they differ, all that they say."""
    found: dict[str, dict[str, Any]] = {}
    for environment in environments:
        for key, value in environment.items():
            # One may be of several itself.
            parts = value.split(_BETWEEN) if isinstance(value, str) else [value]
            found.setdefault(key, {}).update({str(part): part for part in parts})
    return {
        key: next(iter(parts.values())) if len(parts) == 1 else _BETWEEN.join(parts)
        for key, parts in found.items()
    }


def attention_implementations() -> list[str]:
    """What can compute attention here, by transformers' names, its first choice first."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    found = ["sdpa", "eager"]
    return [*found, "flash_attention_2"] if is_flash_attn_2_available() else found


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's model and how many of its threads there are."""
    from adaskip.profiling.calibration import processor_name

    return f"{processor_name()} × {os.cpu_count()}"


def git_commit() -> str | None:
    """The commit of the checkout the package runs from; None outside one.

    With `-dirty` if a tracked file differs from it, results aside: those are what runs change. A
    digest of the difference follows, so that what was measured before an edit is not taken for
    what is measured after it.
    """
    if not (CHECKOUT / ".git").exists():
        return None
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("diff", "HEAD", "--", ".", ":(exclude)results")
    except (OSError, subprocess.SubprocessError):
        return None
    if not changes:
        return commit
    return f"{commit}-dirty-{hashlib.sha256(changes.encode()).hexdigest()[:8]}"


def _git(*arguments: str) -> str:
    """What a git command prints about the checkout."""
    done = subprocess.run(  # noqa: S603 - the arguments are those above
        ["git", *arguments],  # noqa: S607 - whichever git the user has
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        errors="replace",  # a difference has the encodings of its files
        timeout=10,
        check=True,
    )
    return done.stdout.strip()
