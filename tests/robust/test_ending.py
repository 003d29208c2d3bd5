"""How the program ends: by a signal, without memory, without anyone who reads what it prints."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import fine_tuned, hashes, read_model, tiny_tensors, write_model, write_recipe
from processes import Server

# sends a signal where a module is about to be imported, once or again and again
STOPPED = """
import os, sys, threading
module, number, again = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "again"
del sys.argv[1:4]

def kill():
    while again:
        os.kill(os.getpid(), number)

def hook(event, args):
    if event == "import" and args[0] == module:
        os.kill(os.getpid(), number)
        threading.Thread(target=kill, daemon=True).start()

sys.addaudithook(hook)
from mergebench.cli import command
command()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """base, ft1, ft2 and a recipe."""
    place = tmp_path / "work"
    base = tiny_tensors()
    write_model(place / "base", base)
    for number in (1, 2):
        write_model(place / f"ft{number}", fine_tuned(base, number))
    write_recipe(place / "recipe.yaml", "ties", ["ft1", "ft2"], "base", parameters={"density": 0.5})
    return place


@pytest.mark.parametrize("again", ["once", "again"])
@pytest.mark.parametrize(
    "module, by, says",
    [
        ("typer", signal.SIGINT, "interrupted: no result was written\n"),
        ("torch", signal.SIGINT, "interrupted: what is complete is kept; continue with --resume\n"),
        ("torch", signal.SIGTERM, "interrupted: what is complete is kept; continue with --resume\n"),
        ("torch", signal.SIGHUP, "interrupted: what was measured is kept; the same command continues\n"),
    ],
)
def test_a_signal_is_one_line(folder: Path, module: str, by: signal.Signals, says: str, again: str) -> None:
    """While it starts as later, sent once or over and over by who cannot wait."""
    command = "eval" if "measured" in says else "merge"
    args = [command, "recipe.yaml", *(["ft1"] if command == "eval" else []), "--out", "out", "-q"]
    program = [sys.executable, "-c", STOPPED, module, str(int(by)), again, *args]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + by, "", says)


@pytest.mark.parametrize(
    "by, word", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "interrupted"), (signal.SIGHUP, "interrupted")]
)
@pytest.mark.parametrize("forked", [False, True])
def test_a_merge_that_is_ended_goes_on(
    server: Server, folder: Path, by: signal.Signals, word: str, forked: bool
) -> None:
    args = ["merge", "recipe.yaml", "--shard-size", "300B", "--workers", "2", "-q"]
    code, out, err = server.run(*args, "--out", "out", folder=folder, die_at=12, by=by, forked=forked)
    assert (code, out) == (128 + by, "")
    left = r"left: \.out\.partial \([\d.]+ kB\); continue with --resume, or delete it\n"
    assert re.fullmatch(f"{word}\n{left}", err)
    assert not (folder / "out").exists()
    assert server.run(*args, "--out", "out", "--resume", folder=folder) == (0, "out\n", "")
    assert server.run(*args, "--out", "whole", folder=folder) == (0, "whole\n", "")
    files = {name: value for name, value in hashes(folder / "whole").items() if name.endswith(".safetensors")}
    assert files.items() <= hashes(folder / "out").items()


def test_workers_fail_in_one_line(server: Server, folder: Path) -> None:
    """Though batches are on their way to the worker that fails."""
    base = {f"layers.{number}.weight": torch.ones(16, 24) for number in range(100)}
    bad = base | {"layers.1.weight": torch.full((16, 24), float("nan"))}
    write_model(folder / "base", base)
    write_model(folder / "ft1", base)
    write_model(folder / "ft2", bad)
    says = "error: layers.1.weight: ft2 has nan at [0, 0]\n"
    for _ in range(6):
        args = ["merge", "recipe.yaml", "--workers", "2", "--out", "out", "-q"]
        code, out, err = server.run(*args, folder=folder, forked=True)
        assert (code, out) == (1, "") and err.startswith(says) and err.count("\n") == 2


# merges with so many bytes of address space more than Python and torch take
STARVED = """
import resource, sys
import mergebench.api, mergebench.engine.executors, mergebench.evaluation.page.card, mergebench.methods.ties
room, forked = int(sys.argv[1]), sys.argv[2] == "forked"
del sys.argv[1:3]
if forked:
    mergebench.engine.executors.FORK_FROM = 0
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
from mergebench.cli import command
command()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
@pytest.mark.parametrize("how", [pytest.param("threads", marks=pytest.mark.slow), "forked"])
def test_too_little_memory_is_one_line(folder: Path, how: str) -> None:
    base = {"x": torch.ones(1000, 1000), "y": torch.ones(1000, 1000)}
    for step, name in enumerate(("base", "ft1", "ft2")):  # what no model changed is copied, in less memory
        write_model(folder / name, {key: value + step for key, value in base.items()})
    args = ["merge", "recipe.yaml", "--workers", "2", "--out", "out", "-q"]
    program = [sys.executable, "-c", STARVED, str(28 << 20), how, *args]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    # where it happens is the system's choice: in a library's import, in the merge, with a result begun
    hint = r"(ask for less: --memory 100MB --workers 1, and continue with --resume|free some, or raise the limit.*)"
    left = r"(left: \.out\.partial .*\n)?"
    assert re.fullmatch(rf"error: mergebench merge: out of memory\nhint: {hint}\n{left}", done.stderr)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("redirected", ["2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_who_does_not_listen_does_not_stop_it(folder: Path, redirected: str) -> None:
    """Streams that are closed, or full: the merge is done, and no file takes a stream's number."""
    command = f"exec {shlex.quote(sys.executable)} -m mergebench merge recipe.yaml --out out {redirected}"
    done = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr + done.stdout
    assert "wrote" not in done.stdout  # a closed stderr is not stdout
    assert read_model(folder / "out").keys() == tiny_tensors().keys()
