"""The house stands as drawn: imports run downwards, methods are short, files can be read at one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mergebench"
# From top to bottom. Top-level modules stand between the command line and the rooms.
ROOMS = [
    "cli",
    "",
    "testing",
    "systems",
    "training",
    "evaluation",
    "recipe",
    "adapters",
    "editing",
    "methods",
    "networks",
    "engine",
    "deltas",
    "checkpoint",
    "plugins",
    "parameters",
    "errors",
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if not path.is_symlink())


def room(module: str) -> str:
    part = module.split(".")[1] if "." in module else ""
    return part if part in ROOMS else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    if path.parent == PACKAGE and path.name.startswith("__"):
        pytest.skip("the ways in")
    own = room("mergebench." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [
                f"{node.module}.{alias.name}" if node.module == "mergebench" else node.module for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "mergebench" and name not in ("mergebench", "mergebench.__version__"):
                assert ROOMS.index(own) <= ROOMS.index(room(name)), f"{path.name} imports {name} from above"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())

    assert lines <= (80 if path.parent.name == "methods" else 320)
