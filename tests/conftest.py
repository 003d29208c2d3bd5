"""What several rooms' tests share: the command line, called as a shell would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from processes import Server

from mergebench.cli import main

Cli = Callable[..., "Ran"]


class Ran(NamedTuple):
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command line in this process: `cli("merge", recipe, "--out", out)`."""

    def run(*args: Any) -> Ran:
        monkeypatch.setattr(sys, "argv", ["mergebench", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return Ran(end.value.code if isinstance(end.value.code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture
def shell() -> Cli:
    """Run the command line in a process of its own: `shell("merge", recipe, cwd=..., HF_HOME=...)`."""

    def run(*args: Any, cwd: Path | None = None, timeout: float = 120, **environment: str) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "mergebench", *map(str, args)],
            cwd=cwd,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Starts command lines in processes of their own, cheaply: `server.run("merge", recipe, folder=folder)`."""
    one = Server()
    yield one
    one.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As a worker has; and on small matrices, threads only wait for one another."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
