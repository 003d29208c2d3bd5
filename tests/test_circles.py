"""The house can be walked from the top down: no circle between files, few entries at the top, short files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mergebench"
ENTRIES, LINES = 17, 320
Graph = dict[Path, set[Path]]


def imported(path: Path, package: Path) -> Iterator[str]:
    """Every module a file names in an `import`: at its top, inside functions, for type checkers only."""
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join([*parts[: len(parts) - node.level], *filter(None, [node.module])]) if node.level else None
            yield from (f"{start or node.module}.{alias.name}" for alias in node.names)


def graph_of(package: Path) -> Graph:
    """Which file of a package imports which other; a name taken from a folder may be a file in it."""
    files = {path for path in package.rglob("*.py") if not path.is_symlink()}

    def file_of(module: str) -> Path | None:
        place = package.parent.joinpath(*module.split("."))
        found = {place.with_suffix(".py"), place / "__init__.py"} & files
        if found or "." not in module:
            return next(iter(found), None)
        return file_of(module.rpartition(".")[0])

    graph: Graph = {path: set() for path in files}
    for path in files:
        for module in imported(path, package):
            # whoever writes down the version, a constant of the package, imports none of its public names
            version = (package.name, f"{package.name}.__version__")
            if module.split(".")[0] == package.name and module not in version:
                target = file_of(module)
                if target is not None:
                    graph[path].add(target)
    return graph


def circles(graph: Graph) -> list[list[Path]]:
    """Files that reach one another: strongly connected components of more than one (Tarjan 1972)."""
    number: dict[Path, int] = {}
    low: dict[Path, int] = {}
    stack: list[Path] = []
    found: list[list[Path]] = []

    def visit(path: Path) -> None:
        number[path] = low[path] = len(number)
        stack.append(path)
        for other in graph[path]:
            if other not in number:
                visit(other)
                low[path] = min(low[path], low[other])
            elif other in stack:
                low[path] = min(low[path], number[other])
        if low[path] == number[path]:
            at = stack.index(path)
            component, stack[at:] = stack[at:], []
            if len(component) > 1:
                found.append(sorted(component))

    for path in sorted(graph):
        if path not in number:
            visit(path)
    return sorted(found)


def test_no_two_files_import_each_other_in_a_circle() -> None:
    found = circles(graph_of(PACKAGE))
    text = "\n".join(", ".join(str(path.relative_to(PACKAGE)) for path in one) for one in found)
    assert not found, f"{len(found)} circles:\n{text}"


def test_the_top_is_read_at_a_glance() -> None:
    entries = sorted(path.name for path in PACKAGE.iterdir() if path.suffix in ("", ".py"))
    entries = [name for name in entries if not name.startswith(("_", "."))]
    assert len(entries) <= ENTRIES, f"{len(entries)} entries: {', '.join(entries)}"


def test_no_file_is_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {str(path.relative_to(PACKAGE)): n for path, n in lengths.items() if n > LINES}


# -- the check itself ------------------------------------------------------------------------------------

WAYS = {
    "at the top": "from house.b import thing",
    "as a module": "import house.b",
    "out of the folder": "from house import b",
    "in a function": "def f():\n    from house.b import thing",
    "for types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.b import Thing",
    "relative": "from .b import thing",
    "relative, out of the folder": "from . import b",
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_import_counts(way: str, tmp_path: Path) -> None:
    house = tmp_path / "house"
    (house / "room").mkdir(parents=True)
    (house / "__init__.py").write_text("from house.a import face")
    (house / "room/__init__.py").write_text("")
    (house / "a.py").write_text(WAYS[way])
    (house / "b.py").write_text("from house.room import c\nfrom house import __version__")
    (house / "room/c.py").write_text("import os\nfrom house.d import x")
    (house / "d.py").write_text("")
    assert circles(graph_of(house)) == []
    (house / "d.py").write_text("from house.a import y")
    assert circles(graph_of(house)) == [[house / "a.py", house / "b.py", house / "d.py", house / "room/c.py"]]
    (house / "room/__init__.py").write_text("from house.room.c import x")
    (house / "d.py").write_text("from house.room import x")
    assert circles(graph_of(house)) == [[house / "d.py", house / "room/__init__.py", house / "room/c.py"]]
