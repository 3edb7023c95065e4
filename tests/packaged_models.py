"""The packaged models where they are installed, and marks for tests that need one."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaskip.errors import AdaskipError
from adaskip.models.packaged import Package, gguf_parts
from adaskip.models.spec import model_spec

NAMES = ("smollm2", "gemma3", "qwen")


def package(name: str) -> Package:
    found = model_spec(name).package
    assert found is not None
    return found


def installed_parts(name: str) -> list[Path] | None:
    """The parts of a model's GGUF file, None where a package is not installed."""
    try:
        return gguf_parts(name, package(name))
    except AdaskipError:
        return None


def needs(name: str) -> pytest.MarkDecorator:
    missing = installed_parts(name) is None
    return pytest.mark.skipif(missing, reason=f"the packages of {name} are not installed")
