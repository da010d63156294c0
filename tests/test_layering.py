"""Imports run one way: cli -> pipeline -> {attacks, defenses, recognition, metrics, data} -> base contracts."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import defenses

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


#: The rooms of the house, lowest floor first. A module imports from its own floor's room and from the floors below it;
#: rooms on one floor do not know each other.
FLOORS = (
    ("bench",),
    ("bench.data",),
    ("bench.data.sources", "bench.data.synthetic"),
    ("bench.data.stream", "bench.data.tools"),
    ("bench.nets",),
    ("defenses",),
    ("attacks.parts", "bench.recognition", "bench.metrics"),
    ("attacks",),
    ("bench.run",),
    ("bench.gate", "bench.sweep"),
    ("reports",),
    ("bench.commands",),
    ("bench.cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

#: Contracts, which the rooms above share with whoever implements them.
CONTRACTS = {"attacks.base": "attacks.parts", "bench.__main__": "bench.cli"}


def room_of(module: str) -> str:
    """The room that a module stands in: the longest name in :data:`FLOORS` that it lies below."""
    if module in CONTRACTS:
        return CONTRACTS[module]
    return max((room for room in FLOOR_OF if within(module, room)), key=len)


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_run_down_the_stairs(module: str) -> None:
    room = room_of(module)
    upwards = {
        name
        for name in GRAPH[module]
        if room_of(name) != room and FLOOR_OF[room_of(name)] >= FLOOR_OF[room] and name in GRAPH
    }
    assert upwards == set()


@pytest.mark.parametrize("module", modules("attacks"))
def test_nothing_in_an_attack_can_reach_a_victim(module: str) -> None:
    assert {name for name in reachable(module) if within(name, "bench.data", "bench.run")} == set()


@pytest.mark.parametrize("module", modules("defenses"))
def test_a_defence_imports_neither_attacks_nor_the_harness(module: str) -> None:
    shared = ("errors", "images", "memory", "nets", "randomness", "registry")
    allowed = ("defenses", *(f"bench.{name}" for name in shared))
    assert {name for name in reachable(module) if not within(name, *allowed)} <= {"bench"}


def test_only_commands_import_reports() -> None:
    importers = {module for module, names in GRAPH.items() if any(within(name, "reports") for name in names)}
    assert {module for module in importers if not within(module, "reports", "bench.commands")} == set()


SHARED = {
    "attacks": {"attacks", "attacks.base"},
    "defenses": {f"defenses.{name}" for name in defenses.SUPPORT_MODULES} | {"defenses"},
}


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_nothing_names_a_concrete_plugin(module: str) -> None:
    """A new defence or attack is one new file: nothing else may know the ones that exist, nor may they each other."""
    for package, shared in SHARED.items():
        named = {name for name in GRAPH[module] if within(name, package) and not within(name, f"{package}.parts")}
        assert named <= shared or (module, *sorted(named - shared)) in BUILT_ON


#: Plug-ins that are another one with a second step.
BUILT_ON = {("attacks.unrolled", "attacks.linear"), ("attacks.unmix", "attacks.linear")}


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
        ("import bench.data.faces as f", {"bench.data.faces"}),
        ("from bench.data import faces", {"bench.data.faces"}),
        ("from bench.data.faces import FaceSet", {"bench.data.faces"}),
        ("from .base import Attack", {"attacks.base"}),
        ("from . import base", {"attacks.base"}),
        ("def f():\n    import defenses.base", {"defenses.base"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import bench.cli", set()),
        ("import torch, benchmark", set()),
    ],
)
def test_the_import_reader_itself(line: str, expected: set[str]) -> None:
    known = {"attacks", "attacks.base", "bench.data", "bench.data.faces"}
    assert imported(line, "attacks.unet", False, known) == expected


def test_lazy_imports_count_for_layers_and_not_for_circles() -> None:
    source = "def f():\n    import defenses.base\nimport attacks.base"
    assert imported(source, "attacks.unet", False, set(), at_import=True) == {"attacks.base"}
