"""The architecture: what may import what, walked through the sources and seen in a process."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "adaskip"
# From the bottom up. A package imports those before it and itself.
LIBRARY = ("core", "policies", "profiling", "search", "methods", "models", "export")
HARNESS = ("tasks", "runs", "observing", "speedtest", "leaderboard", "reports", "cli")
ORDER = (*LIBRARY, *HARNESS)
# Modules beside the packages that do not belong to the core.
BESIDE = {"metrics": "tasks", "tables": "tasks", "sweep": "cli", "__main__": "cli"}


def sources() -> dict[str, Path]:
    """Every module of the package and its file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def layer(module: str) -> str:
    _, _, inner = module.partition(".")
    first = inner.partition(".")[0]
    return first if first in ORDER else BESIDE.get(first, "core")


def imports(path: Path, modules: dict[str, Path], *, inside: bool = True) -> set[str]:
    """The modules a file imports, those inside functions too if asked for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if inside else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
    return {name for name in found if name in modules}


def test_every_package_has_its_place() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages == set(ORDER) - {"core"}
    assert all((PACKAGE / f"{name}.py").is_file() for name in BESIDE)


def test_nothing_imports_what_stands_above_it() -> None:
    modules = sources()
    wrong = []
    for module, path in modules.items():
        if module == "adaskip":
            continue
        for other in imports(path, modules):
            if other != "adaskip" and ORDER.index(layer(other)) > ORDER.index(layer(module)):
                wrong.append(f"{module} ({layer(module)}) imports {other} ({layer(other)})")
    assert wrong == []


def test_no_circles() -> None:
    modules = sources()
    graph = {
        module: imports(path, modules, inside=False) - {module, "adaskip"}
        for module, path in modules.items()
        if module != "adaskip"
    }
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) == len(graph)


# Everything the library offers, asked for; then what that loaded.
ASK = """
import sys
import adaskip
for name in adaskip.__all__:
    getattr(adaskip, name)
print(*sorted(name for name in sys.modules if name.startswith("adaskip.")))
"""


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_library_loads_nothing_of_the_harness(loaded: set[str]) -> None:
    assert "adaskip.session" in loaded
    assert [name for name in loaded if layer(name) in HARNESS] == []
