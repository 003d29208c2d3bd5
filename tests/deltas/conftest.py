"""A base and a change to it of every kind, in the working directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.deltas.kinds import write_world


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_world(tmp_path_factory.mktemp("made") / "world")


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, a copy of `made`."""
    shutil.copytree(made, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"
