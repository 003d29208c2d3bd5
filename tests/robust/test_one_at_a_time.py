"""Two runs into one output: the second is told so and touches nothing; a dead run's lock is no obstacle."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import fine_tuned, hashes, names, read_model, write_model, write_recipe
from processes import Server

from tests.conftest import Cli

HOLD = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    base = {f"layers.{i}.weight": torch.randn(512, 1024).bfloat16() for i in range(4)}
    write_model(folder / "base", base)
    write_model(folder / "ft", fine_tuned(base, 1))
    write_recipe(folder / "recipe.yaml", "pcb", ["ft", "base"], "base")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("option", ["-q", "--resume", "--overwrite"])
def test_another_process_holds_the_output(folder: Path, cli: Cli, option: str) -> None:
    partial = folder / ".out.partial"
    partial.mkdir()
    (partial / ".journal.json").write_text("{}")
    (partial / "model.safetensors").write_bytes(b"half a shard")
    before = hashes(folder)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(partial)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        code, out, err = cli("merge", "recipe.yaml", "--out", "out", "-q", option)
        assert (code, out) == (1, "")
        assert err == "error: out: another run is writing it\nhint: wait for it, or choose another --out\n"
        assert hashes(folder) == before
        other.kill()
    assert cli("merge", "recipe.yaml", "--out", "out", "-q").code == 0


def test_two_real_runs(server: Server, folder: Path) -> None:
    """While one is at work (stopped on the way: it holds its lock), a second is refused; the first is not disturbed."""
    args = ["merge", "recipe.yaml", "--out", "out", "--workers", "1", "-q"]
    first = server.start(*args, folder=folder, die_at=6, by=signal.SIGSTOP)
    first.wait_until_stopped()
    assert (folder / ".out.partial" / ".journal.json").exists()
    code, _, err = server.run(*args, folder=folder)
    first.signal(signal.SIGCONT)
    assert first.wait() == (0, "out\n", "")
    assert code == 1 and "another run is writing it" in err
    assert read_model(folder / "out").keys() == read_model(folder / "base").keys()
    assert names(folder) == ["base", "ft", "out", "recipe.yaml"]


def test_a_failed_run_gives_the_lock_back(folder: Path, cli: Cli) -> None:
    """In one process, as in a notebook: a refused start may be followed by another."""
    (folder / ".out.partial").mkdir()
    (folder / ".out.partial" / "mine.txt").write_text("years of work")
    assert cli("merge", "recipe.yaml", "--out", "out", "-q").code == 2
    (folder / ".out.partial" / "mine.txt").unlink()
    assert cli("merge", "recipe.yaml", "--out", "out", "-q").code == 0
