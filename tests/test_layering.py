"""Imports run one way: cli -> pipeline -> {attacks, defenses, recognition, metrics, data} -> base contracts."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("bench", "attacks", "defenses", "reports")


def module_files() -> dict[str, Path]:
    """Every module of the project by dotted name."""
    files = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def within(module: str, *packages: str) -> bool:
    """Whether ``module`` is one of ``packages`` or lies below one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def type_checking_only(tree: ast.AST) -> set[ast.AST]:
    """Nodes below ``if TYPE_CHECKING:``, which are never executed."""
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }


def inside_functions(tree: ast.AST) -> set[ast.AST]:
    """Nodes that run when a function is called, not when the module is imported."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return {inner for node in ast.walk(tree) if isinstance(node, functions) for inner in ast.walk(node)} - {tree}


def imported(source: str, module: str, is_package: bool, known: set[str], *, at_import: bool = False) -> set[str]:
    """Modules of the project that ``source`` imports; ``from a import b`` is ``a.b`` where that is a module.

    Args:
        source: Python code.
        module: its dotted name.
        is_package: whether it is an ``__init__.py``.
        known: the modules of the project.
        at_import: leave out imports inside functions.
    """
    tree = ast.parse(source)
    skipped = type_checking_only(tree) | (inside_functions(tree) if at_import else set())
    package = module if is_package else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else str(node.module)
            for alias in node.names:
                child = f"{base}.{alias.name}"
                found.add(child if child in known else base)
    return {name for name in found if within(name, *PACKAGES)} - {module}


def import_graph(*, at_import: bool = False) -> dict[str, set[str]]:
    """Module -> modules of the project that it imports."""
    files = module_files()
    return {
        module: imported(
            path.read_text(encoding="utf-8"), module, path.name == "__init__.py", set(files), at_import=at_import
        )
        for module, path in files.items()
    }


GRAPH = import_graph()


def reachable(module: str) -> set[str]:
    """Everything that importing ``module`` may bring in, directly or not."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        for name in GRAPH.get(waiting.pop(), set()) - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def modules(*packages: str) -> list[str]:
    """The modules of some packages."""
    return [module for module in sorted(GRAPH) if within(module, *packages)]


@pytest.mark.parametrize("module", modules("defenses"))
def test_a_defence_imports_neither_attacks_nor_the_harness(module: str) -> None:
    assert {name for name in reachable(module) if not within(name, "defenses")} == set()


@pytest.mark.parametrize("module", modules("attacks"))
def test_an_attack_imports_no_concrete_defence_and_no_harness(module: str) -> None:
    outside = {name for name in reachable(module) if not within(name, "attacks")}
    assert outside <= {"defenses", "defenses.base"}


@pytest.mark.parametrize("module", modules("reports"))
def test_reports_know_results_and_run_nothing(module: str) -> None:
    forbidden = (
        "attacks",
        "defenses",
        "bench.pipeline",
        "bench.cli",
        "bench.stages",
        "bench.recognition",
        "bench.data",
    )
    # Intervals of worst cases come from bench.metrics, whose signatures name a type of this module.
    types = {"bench.data.faceset"}
    assert {name for name in reachable(module) if within(name, *forbidden)} <= types


@pytest.mark.parametrize("module", modules("bench.recognition", "bench.metrics", "bench.data"))
def test_the_parts_of_the_harness_know_neither_each_run_nor_plugins(module: str) -> None:
    forbidden = ("attacks", "reports", "bench.pipeline", "bench.cli", "bench.stages", "bench.plugins")
    found = {name for name in reachable(module) if within(name, *forbidden)}
    concrete = {name for name in reachable(module) if within(name, "defenses")} - {"defenses", "defenses.base"}
    assert found | concrete == set()


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_no_module_of_the_harness_names_a_concrete_plugin(module: str) -> None:
    """A new defence or attack is one new file: nothing else may know the ones that exist."""
    if within(module, "attacks", "defenses"):
        return
    # What ``Defense.canonical`` means by places is read in one way, by attacks and by the harness that checks them.
    contracts = {"attacks", "attacks.base", "attacks.layout", "defenses", "defenses.base"}
    assert {name for name in GRAPH[module] if within(name, "attacks", "defenses")} <= contracts


def test_only_the_entry_point_imports_the_command_line() -> None:
    importers = {module for module, names in GRAPH.items() if "bench.cli" in names}
    assert importers <= {"bench.__main__"}


def test_modules_do_not_import_in_circles() -> None:
    try:
        TopologicalSorter(import_graph(at_import=True)).prepare()
    except CycleError as error:
        pytest.fail(f"circular import: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import bench.data.faceset as f", {"bench.data.faceset"}),
        ("from bench.data import faceset", {"bench.data.faceset"}),
        ("from bench.data.faceset import FaceSet", {"bench.data.faceset"}),
        ("from .base import Attack", {"attacks.base"}),
        ("from . import base", {"attacks.base"}),
        ("def f():\n    import defenses.base", {"defenses.base"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import bench.cli", set()),
        ("import torch, benchmark", set()),
    ],
)
def test_the_import_reader_itself(line: str, expected: set[str]) -> None:
    known = {"attacks", "attacks.base", "bench.data", "bench.data.faceset"}
    assert imported(line, "attacks.unet", False, known) == expected


def test_lazy_imports_count_for_layers_and_not_for_circles() -> None:
    source = "def f():\n    import defenses.base\nimport attacks.base"
    assert imported(source, "attacks.unet", False, set(), at_import=True) == {"attacks.base"}
