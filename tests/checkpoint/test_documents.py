"""The one reader: what it takes and what it refuses, and that nothing else reads."""

from __future__ import annotations

import ast
import json
import os
import threading
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest

import mergebench
from mergebench.checkpoint.documents import DEEPEST, complaint, document, parse_json, read_bytes
from mergebench.errors import RunError

PACKAGE = Path(mergebench.__file__).parent


class Item(TypedDict):
    id: str | int
    score: float


class Report(TypedDict, total=False):
    name: str
    items: list[Item]
    shares: dict[str, float]
    role: Literal["base", "input"]
    seed: int | None


GOOD = {"name": "é", "items": [{"id": 1, "score": 2, "more": 1}], "shares": {"a": 0.5}, "role": "base", "seed": None}


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("change, says", [
    ({}, None),
    ({"name": None}, "name: must be text, got null"),
    ({"items": {}}, "items: must be a list, got a mapping"),
    ({"items": [{"id": 1}]}, "items.0: no 'score'"),
    ({"items": [{"id": 1.5, "score": 2}]}, "items.0.id: must be text, got 1.5"),
    ({"items": [{"id": "a", "score": True}]}, "items.0.score: must be a finite number, got true"),
    ({"shares": {"a": float("nan")}}, "shares.a: must be a finite number, got NaN"),
    ({"shares": {"a": float("inf")}}, "shares.a: must be a finite number, got Infinity"),
    ({"role": ["base"]}, "role: must be one of base, input, got a list"),
    ({"seed": True}, "seed: must be a whole number, got true"),
])  # fmt: skip
def test_types(change: dict[str, Any], says: str | None) -> None:
    assert complaint(GOOD | change, Report) == says


@pytest.mark.parametrize("text, says", [
    ("[]", "not a JSON object"),
    ('{"a": 1,}', "column 9"),
    (b'{"a": "\xff"}', "not UTF-8 text"),
    (b'{"a": "\xed\xa0\x80"}', "not UTF-8 text"),
    (b'\xff\xfe{\x00}\x00', "not UTF-8 text"),
    ('{"\\ud800": 1}', r"'\ud800' is half of a character"),
    ('{"a": ["\\udC00x"]}', r"'\udc00' is half of a character"),
    ('{"a":' * 100_000, "nested too deep"),
    (f'{{"a": {nested(DEEPEST)}}}', "nested too deep"),
    ('{"a": ' + "9" * 309 + "}", "a number is too large"),
    ('{"a": ' + "9" * 5000 + "}", "a number is too large"),
])  # fmt: skip
def test_refused(text: str | bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(RunError) as failed:
        document(file)
    assert says in failed.value.message and failed.value.message.startswith(f"{file}: ")


@pytest.mark.parametrize("text", [
    '{"a": "\\ud83d\\ude00\\u00e9"}',
    '{"time_step_limit": [0.0, Infinity]}',
    '{"model_max_length": 1000000000000000019884624838656}',
    f'{{"a": {nested(DEEPEST - 2)}}}',
])  # fmt: skip
def test_taken_as_json_takes_it(text: str) -> None:
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


def test_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "b\udcff").write_text("x")
    for name, says in {"pipe": "not a regular", "link": "not a regular", ".": "directory", "b\udcff": "UTF-8"}.items():
        found: list[OSError] = []
        reading = threading.Thread(target=_read, args=(tmp_path / name, found), daemon=True)
        reading.start()
        reading.join(20)
        assert found and says in (found[0].strerror or ""), name


def _read(file: Path, found: list[OSError]) -> None:
    try:
        read_bytes(file)
    except OSError as error:
        found.append(error)


# -- nothing else reads ----------------------------------------------------------------------------------

OWN = {  # what reads no file that another program may have written
    "checkpoint/documents.py": "the reader itself",
    "cli/streams.py": "/dev/null",
    "engine/cluster.py": "/dev/null",
    "engine/machine.py": "the kernel's files",
    "training/memory.py": "the kernel's files",
    "checkpoint/target.py": "the kernel's list of mounts",
    "checkpoint/staging.py": "a directory, to wait for the disk",
    "plugins.py": "what pip notes of an installed package",
    "systems/lst/activations.py": "files being written",
    "checkpoint/shards.py": "files being written",
    "editing/neurons.py": "files being written",
    "editing/probes/feature_cache.py": "files being written",
    "evaluation/page/__init__.py": "the package's own files",
    "testing/edits.py": "files it has just written",
    "testing/doctor_adapters.py": "files it has just written",
    "testing/methods.py": "files it has just written",
}
READS = {"read_text", "read_bytes", "load_file", "safe_open", "fromfile", "loadtxt", "memmap"}


def reading(path: Path) -> list[str]:
    """Calls in a file by which it reads one, or JSON; copies by way of JSON are none."""
    taken = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "mergebench.checkpoint.documents":
            taken |= {alias.name for alias in node.names}
    found = []
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func)
        copies = name == "json.loads" and "json.dumps" in ast.unparse(call.args[0])
        last = name.rpartition(".")[2]
        mine = last in READS and name not in taken
        folder = name == "os.open" and ast.unparse(call.args[0]) in ("folder", "self.directory")  # to be locked
        if (mine or name in ("open", "os.open", "json.load", "json.loads")) and not copies and not folder:
            found.append(f"{call.lineno}: {name}")
    return found


def test_nothing_else_reads() -> None:
    found = {str(path.relative_to(PACKAGE)): reading(path) for path in PACKAGE.rglob("*.py")}
    assert {name: calls for name, calls in found.items() if calls and name not in OWN} == {}
    assert [name for name in OWN if not found.get(name)] == [], "no longer needed"
