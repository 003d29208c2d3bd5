"""A disk that fills up: one line, exit code 1, and --resume goes on once there is room."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import fine_tuned, hashes, read_model, write_model, write_recipe
from processes import Server

NAMES = [f"layers.{i}.weight" for i in range(8)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Models of 800 kB, in eight tensors."""
    folder = tmp_path / "work"
    base = {name: torch.randn(100, 250) for name in NAMES}
    write_model(folder / "base", base, side_files={"tokenizer.json": "x" * 600_000})
    write_model(folder / "ft", fine_tuned(base, 1))
    write_recipe(folder / "recipe.yaml", "task_arithmetic", ["ft"], "base")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", place]).returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", place], check=True)


def check_failed(ran: tuple[int, str, str], *says: str, hint: str) -> None:
    code, out, err = ran
    assert (code, out) == (1, "")
    error, advice, *left = err.splitlines()
    assert all(re.fullmatch(r"left: .*; continue with --resume, or delete it", line) for line in left)
    assert error.startswith("error: ") and advice.startswith("hint: ")
    for word in says:
        assert word in error
    assert hint in advice


def merge(*more: str) -> list[str]:
    return ["merge", "recipe.yaml", "-q", "--shard-size", "100kB", *more]


def test_the_disk_fills_up(server: Server, folder: Path, disk: Path) -> None:
    """The weights fit, the tokenizer after them does not."""
    before = hashes(folder)
    out = disk / "out"
    check_failed(
        server.run(*merge("--out", str(out)), folder=folder), "disk", "No space left on device", hint="--resume"
    )
    assert hashes(folder) == before
    assert not out.exists()
    assert not (disk / ".out.partial" / "mergebench.json").exists()
    subprocess.run(["mount", "-o", "remount,size=3m", disk], check=True)
    assert server.run(*merge("--out", str(out), "--resume"), folder=folder) == (0, f"{out}\n", "")
    assert read_model(out).keys() == set(NAMES)
    assert sorted(path.name for path in disk.iterdir()) == ["out"]


def test_no_room_from_the_start(server: Server, folder: Path, disk: Path) -> None:
    """Known before the first tensor is read: nothing is written."""
    (disk / "other").write_bytes(bytes(500_000))
    check_failed(
        server.run(*merge("--out", str(disk / "deep" / "out")), folder=folder), "0.00 GB, the disk", hint="--out"
    )
    assert [path.name for path in disk.iterdir()] == ["other"]


def test_what_is_there_already_needs_no_room(server: Server, folder: Path, disk: Path) -> None:
    """Resuming, the shards that are complete are not counted again; nor does starting afresh count what it deletes."""
    out = disk / "out"
    assert server.run(*merge("--out", str(out)), folder=folder)[0] == 1
    partial = disk / ".out.partial"
    held = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    assert held > 700_000
    (folder / "base" / "tokenizer.json").write_text("{}")
    assert server.run(*merge("--out", str(out), "--resume"), folder=folder)[0] == 0
    subprocess.run(["mv", out, partial], check=True)
    assert server.run(*merge("--out", str(out)), folder=folder)[0] == 0


def test_a_shard_that_may_not_be_written(server: Server, folder: Path) -> None:
    """Where root or a small disk is not to be had: a limit on the size of a file, met by the second shard."""
    before = hashes(folder)
    tensors = read_model(folder / "base")
    tensors["layers.3.weight"] = torch.randn(200, 250)
    for name, model in (("base", tensors), ("ft", fine_tuned(tensors, 1))):
        write_model(folder / name, model)
    before = hashes(folder)
    check_failed(
        server.run(*merge("--out", "out"), folder=folder, largest_file=150_000),
        "model-0000",
        "File too large",
        hint="--resume",
    )
    after = hashes(folder)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {".out.partial"}
    done = json.loads((folder / ".out.partial" / ".journal.json").read_text())["shards"]
    assert 0 < len(done) < 8
    assert server.run(*merge("--out", "out", "--resume"), folder=folder) == (0, "out\n", "")
    expected = read_model(folder / "ft")
    assert all(torch.equal(value, expected[name]) for name, value in read_model(folder / "out").items())
