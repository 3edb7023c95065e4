"""What an installation brings: built from the tree, tried in an environment of its own."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_layers import HARNESS, layer, sources

from adaskip.cli.main import COMMANDS, EXTRAS

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BACKEND = PYPROJECT["build-system"]["build-backend"]
# What a user's script asks of the package, with nothing that loads torch.
SCRIPT = """
from adaskip import AdaskipError, __version__
from adaskip.configuration import config_path
print(config_path("demo.yaml"))
"""


def built(kind: str, folder: Path, tree: Path = ROOT) -> Path:
    """The wheel of a tree (`build_wheel`), or that of an editable install (`build_editable`)."""
    pytest.importorskip(BACKEND.partition(".")[0], reason="no build backend (requirements-dev.txt)")
    code = f"import {BACKEND} as b, sys; b.{kind}(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=tree, capture_output=True, check=True
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("build_wheel", tmp_path_factory.mktemp("wheel"))


def installed(wheel: Path, folder: Path) -> Path:
    """The interpreter of a new environment that holds this wheel and sees our packages behind."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(site)
    # A folder named in a .pth file is searched; the .pth files in it are not read.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "shared.pth").write_text("\n".join(others) + "\n")
    return folder / "bin/python"


def run_beside_a_clone(python: Path, folder: Path) -> str:
    """What a script prints that lies beside a folder `adaskip`, as a clone of the project is."""
    folder.mkdir()
    (folder / "adaskip").symlink_to(ROOT)
    script = folder / "my_script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([python, script.name], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_script_beside_the_clone_finds_the_package(tmp_path: Path) -> None:
    editable = tmp_path / "editable"
    editable.mkdir()
    python = installed(built("build_editable", editable), tmp_path / "environment")
    printed = run_beside_a_clone(python, tmp_path / "work")
    assert printed == str(ROOT / "configs/demo.yaml")


def test_the_wheel_brings_its_configurations(wheel: Path, tmp_path: Path) -> None:
    printed = run_beside_a_clone(installed(wheel, tmp_path / "environment"), tmp_path / "work")
    assert Path(printed).parts[-3:] == ("adaskip", "configs", "demo.yaml")
    assert Path(printed).is_relative_to(tmp_path / "environment")


def test_the_wheel_holds_everything(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
    kept = (path for path in (ROOT / "adaskip").rglob("*") if "__pycache__" not in path.parts)
    expected = {str(path.relative_to(ROOT)) for path in kept if path.is_file()}
    expected |= {f"adaskip/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert {"adaskip/py.typed", "adaskip/configs/demo.yaml"} <= expected
    assert any(name.startswith("adaskip/plans/") for name in expected)
    assert {name for name in names if ".dist-info/" not in name} == expected


def requirements(extra: str | None = None) -> set[str]:
    """Distributions that the package, or one of its extras, asks for."""
    project: dict[str, Any] = PYPROJECT["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {_normal(re.split(r"[<>=~!\[ ]", line)[0]) for line in lines}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(path: Path) -> Iterator[str]:
    """Top-level modules a file imports, those of `optional_module` included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "optional_module":
            name: Any = node.args[0]
            yield name.value.partition(".")[0]


@cache
def distributions() -> dict[str, list[str]]:
    """The distributions that bring each top-level module."""
    return {k: [_normal(d) for d in v] for k, v in metadata.packages_distributions().items()}


def test_everything_that_is_imported_is_asked_for() -> None:
    """The harness by [experiments], the export by [export], the library by itself or by one."""
    offered = {
        "export": requirements() | requirements("export"),
        "harness": requirements() | requirements("experiments"),
        "library": requirements() | requirements("experiments") | requirements("export"),
    }
    seen, wrong = set(), []
    for module, path in sources().items():
        kind = "harness" if layer(module) in HARNESS else "library"
        for name in set(imported(path)) - sys.stdlib_module_names - {"adaskip"}:
            seen.add(name)
            brought_by = distributions().get(name, [name])
            if not offered[kind] & set(brought_by):
                wrong.append(f"{module} imports {name}, of {brought_by}")
    assert {"torch", "pydantic", "rouge", "gguf"} <= seen
    assert wrong == []


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_what_its_commands_load(extra: str) -> None:
    for module in EXTRAS[extra]:
        assert requirements(extra) & set(distributions()[module]), module


def test_what_is_asked_for_is_pinned() -> None:
    pins = {}
    for file in ("", "-dev", "-no-deps", "-xllamacpp"):
        for line in (ROOT / f"requirements{file}.txt").read_text(encoding="utf-8").splitlines():
            name, pinned, version = line.partition("==")
            if pinned:
                pins[_normal(name)] = version
    for extra in (None, "experiments", "export", "lm-eval", "dev"):
        assert requirements(extra) <= set(pins), extra


def test_types_are_told() -> None:
    package = importlib.import_module("adaskip")
    assert package.__file__ is not None
    assert Path(package.__file__).with_name("py.typed").is_file()


def test_commands_of_the_package_itself_need_no_extra() -> None:
    """Each is loaded, with all that it imports, where the packages of extras are not there."""
    names = [name for name, entry in COMMANDS.items() if entry.extra is None]
    assert {"chat", "learn", "plan", "run", "export"} <= set(names)
    missing = sorted(set(EXTRAS["experiments"]) - {"jinja2"})  # which comes with torch
    code = (
        f"import sys; sys.modules |= dict.fromkeys({missing})\n"
        f"from adaskip.cli.main import command\nfor name in {names}: command(name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
