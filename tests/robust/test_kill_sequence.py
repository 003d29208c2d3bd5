"""`cil run`, killed at any change to the file system and resumed: the same bytes as undisturbed."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from models import hashes
from processes import Server

from tests.systems.mos.test_sequence_run import here  # noqa: F401  (a fixture)

ARGS = ["cil", "run", "sequence.yaml", "--out", "out", "--device", "cpu", "-q"]


def contents(out: Path) -> dict[str, Any]:
    return {name: digest for name, digest in hashes(out).items() if name != "mergebench.json"}


@pytest.fixture
def folder(here: Path, tmp_path: Path) -> Path:  # noqa: F811
    for name in ("base", "train.jsonl", "test.jsonl"):
        (tmp_path / name).symlink_to(here / name)
    config = {"backbone": "base", "train": "train.jsonl", "test": "test.jsonl", "text": "text", "tasks": 2,
              "seeds": [0], "epochs": 1, "batch": 4, "bottleneck": 2, "align_epochs": 1}  # fmt: skip
    (tmp_path / "sequence.yaml").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.slow
def test_killed_at_every_third_step(server: Server, folder: Path) -> None:
    """The offset is drawn, the last steps are always among them."""
    code, _, err = server.run(*ARGS, folder=folder, count=str(folder.parent / "count"))
    assert (code, err) == (0, "")
    whole, total = contents(folder / "out"), int((folder.parent / "count").read_text())
    shutil.rmtree(folder / "out")
    assert total > 30
    for moment in sorted({*range(random.Random(6).randrange(1, 4), total, 3), total - 2, total - 1, total}):
        assert server.run(*ARGS, folder=folder, die_at=moment)[0] == -signal.SIGKILL, f"step {moment} of {total}"
        if (folder / "out").exists():
            assert contents(folder / "out") == whole
        code, _, err = server.run(*ARGS, "--resume", folder=folder)
        assert (code, err) == (0, ""), f"step {moment} of {total}"
        assert contents(folder / "out") == whole, f"step {moment} of {total}"
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        shutil.rmtree(folder / "out")
