"""The shape of the house: one-way imports, one training loop, small modules, no side doors.

The order of the rooms is written down once, in docs/design.md, and read from there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "efface"
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES = 400, 50
PRINTERS = {"console", "cli"}
LOOP = "fitting"


def read_chain(text: str) -> list[set[str]]:
    """The rooms from left to right; those in braces stand side by side."""
    block = next(b for b in re.findall(r"```text\n(.*?)```", text, re.DOTALL) if "errors →" in b)
    return [set(re.findall(r"[a-z_]+", part)) for part in block.split("→")]


CHAIN = read_chain((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))
PLACE = {room: place for place, rooms in enumerate(CHAIN) for room in rooms}


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def lazy_table() -> dict[str, str]:
    """Public name → room, read from the package's source so that nothing is imported."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_PLACES":
            table: dict[str, str] = ast.literal_eval(node.value)
            return table
    raise AssertionError("efface/__init__.py has no _PLACES")


def imported_rooms(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of the package, wherever it stands."""
    table = lazy_table()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = path.relative_to(PACKAGE.parent).with_suffix("").parts[: -node.level]
            module = ".".join([*package, *([node.module] if node.module else [])])
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "efface" and len(parts) > 1:
                    yield node.lineno, parts[1]
                elif parts[0] == "efface":
                    yield from ((line, table.get(a, a)) for line, a in touched(tree))
            continue
        else:
            continue
        if module == "efface":
            yield from ((node.lineno, table.get(a.name, a.name)) for a in node.names)
        elif module.startswith("efface."):
            yield node.lineno, module.split(".")[1]


def touched(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What is taken from a bare ``import efface``; its version is no room."""
    for node in ast.walk(tree):
        taken = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "efface"
        if taken and node.attr != "__version__":
            yield node.lineno, node.attr


def violations(source: str, path: Path) -> list[str]:
    own = PLACE[room_of(path)]
    found = []
    for line, room in imported_rooms(ast.parse(source), path):
        beside = PLACE[room] == own and room != room_of(path)
        if PLACE[room] > own or beside:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {room}")
    return found


INSIDE = [path for path in MODULES if room_of(path) not in {"__init__", "__main__"}]  # the doors


def test_chain_names_every_room_once() -> None:
    names = [room for rooms in CHAIN for room in rooms]
    assert len(names) == len(set(names))
    assert set(names) == {room_of(path) for path in INSIDE}


@pytest.mark.parametrize("path", INSIDE, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_from_the_left(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    "source",
    [
        "from efface.cli import main",
        "def f():\n    from efface.verbs import train",
        "import efface.report.html",
        "from efface import Task",
        "from .verbs import train",
        "import efface\nefface.audit()",
        "from efface.options import convert",
    ],
)
def test_walk_sees_every_kind_of_import(source: str) -> None:
    assert violations(source, PACKAGE / "where.py") != []


def calls(tree: ast.AST, *names: str) -> list[int]:
    """Lines of calls of methods with one of these names."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in names
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_one_training_loop(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines = calls(tree, "backward", "step")
    assert bool(lines) == (room_of(path) == LOOP), lines


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_printing_no_pickle(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            assert room_of(path) in PRINTERS, f"line {node.lineno} prints"
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
            assert not names & {"pickle", "dill", "cloudpickle", "shelve"}
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in {"pickle", "dill", "shelve"}
        if isinstance(node, ast.Attribute) and node.attr == "load":
            assert getattr(node.value, "id", "") != "torch", f"line {node.lineno}: torch.load"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_are_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, its docstring left out."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        words = node.body[0]
        lines -= (words.end_lineno or words.lineno) - words.lineno + 1
    return lines


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_are_small(path: Path) -> None:
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {f.name: code_lines(f) for f in functions if code_lines(f) > MOST_FUNCTION_LINES}
    assert long == {}
