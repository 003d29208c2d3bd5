"""`mergebench results`: what is kept is listed, and only what was selected is deleted."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli

DAY = 86_400


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three results of different ages, one whose data are gone; and what mergebench did not write."""
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("{}")
    Path("results/features").mkdir(parents=True)
    about: list[dict[str, Any]] = [
        {"model": "x", "task": "t", "suite": str(tmp_path / "a/suite.yaml"), "files": [str(tmp_path / "data.jsonl")]},
        {"model": "y", "task": "t", "suite": str(tmp_path / "a/suite.yaml"), "files": [str(tmp_path / "gone.jsonl")]},
        {"model": "z", "task": "t"},  # of an earlier version
    ]
    for number, (one, age) in enumerate(zip(about, (0, 1, 40), strict=True)):
        path = Path(f"results/{number:040x}.json")
        path.write_text(json.dumps(one))
        os.utime(path, (time.time() - age * DAY,) * 2)
    Path("results/features", "f" * 40).mkdir()
    Path("results/features", "f" * 40, "0.npy").write_bytes(b"x" * 5000)
    for name in ("hashes.json", "notes.txt", "features/mine.txt"):
        Path("results", name).write_text("{}")
    Path("results", "e" * 40 + ".json").symlink_to(tmp_path / "data.jsonl")
    return tmp_path


def there() -> set[str]:
    """Names of files; of results the end."""
    return {
        path.name[36:40] if len(path.name) > 40 else path.name for path in Path("results").rglob("*") if path.is_file()
    }


def test_a_look(cli: Cli) -> None:
    ran = cli("results")
    assert (ran.code, ran.err) == (0, "")
    rows = [line.split() for line in ran.out.splitlines()]
    assert ["a/suite.yaml", "x"] in [row[:2] for row in rows] and ["–", "z", "1"] in [row[:3] for row in rows]
    assert rows[-1][:2] == ["4", "files,"] and "5" in rows[-1][2]
    document = json.loads(cli("results", "--json").out)
    assert (document["results"], document["pruned"]) == (4, False)
    assert {one["model"]: one["gone"] for one in document["kept"]} == {"x": False, "y": True, "z": False, "": False}


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--gone"], {"0.npy", "0000", "0002"}),
        (["--unused", "30"], {"0.npy", "0000", "0001"}),
        (["--unused", "0.5", "--gone"], {"0.npy", "0000", "0002"}),  # both
        (["--unused", "0"], set()),
    ],
)
def test_only_what_is_selected_is_deleted(cli: Cli, options: list[str], left: set[str]) -> None:
    before = there()
    ran = cli("results", *options)
    assert ran.code == 0 and "--prune" in ran.err
    assert there() == before
    ran = cli("results", *options, "--prune")
    assert ran.code == 0 and "deleted" in ran.out
    assert there() == left | {"hashes.json", "notes.txt", "mine.txt", "eeee"}
    assert Path("data.jsonl").exists()


def test_mistakes(cli: Cli) -> None:
    ran = cli("results", "--prune")
    assert (ran.code, ran.err.splitlines()[0]) == (2, "error: --prune: it does not say which")
    ran = cli("results", "elsewhere")
    assert (ran.code, ran.err.splitlines()[0]) == (2, "error: elsewhere: no such directory")


@pytest.mark.parametrize("options", [["--gone"], ["--unused", "99"], ["--gone", "--prune"]])
def test_nothing_is_selected(cli: Cli, options: list[str]) -> None:
    """Which is not said as if nothing were kept."""
    Path("gone.jsonl").write_text("{}")
    assert cli("results", *options) == (0, "nothing to delete in results\n", "")
    assert json.loads(cli("results", *options, "--json").out)["results"] == 0
