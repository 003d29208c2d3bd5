"""A run killed at any change to the file system and resumed gives the same bytes, and no layer twice."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from models import names, write_model
from processes import Server

from tests.adapters.test_extract import contents

ARGS = ["compress", "base", "--energy", "0.6", "--out", "out", "-q", "--json"]
BACK = ["compress", "expand", "small", "--out", "out", "-q"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    folder = tmp_path_factory.mktemp("pela") / "work"
    random = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.fc.weight": torch.randn(12, 16, generator=random) for i in range(2)}
    write_model(folder / "base", base | {"norm.weight": torch.randn(7, generator=random)}, shards=2)
    assert server.run("compress", "base", "--ratio", "2", "--out", "small", "-q", folder=folder)[0] == 0
    return folder


@pytest.mark.parametrize("args", [ARGS, BACK], ids=["compress", "expand"])
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_at_every_step(server: Server, work: Path, tmp_path: Path, args: list[str], every: int) -> None:
    count = tmp_path / "count"
    assert server.run(*args, folder=work, count=str(count))[0] == 0
    whole, steps = contents(work / "out"), int(count.read_text())
    shutil.rmtree(work / "out")
    kept: set[int] = set()
    for moment in range(steps, 0, -every):
        assert server.run(*args, folder=work, die_at=moment)[0] == -signal.SIGKILL
        if not (work / "out").exists():
            journal = work / ".out.partial" / ".journal.json"
            done = json.loads(journal.read_text())["shards"] if journal.exists() else []
            kept.add(len(done))
            assert server.run(*args, "--resume", folder=work)[0] == 0
        assert contents(work / "out") == whole, f"step {moment} of {steps}"
        shutil.rmtree(work / "out")
        assert names(work) == ["base", "small"]
    assert len(kept) > 2 or args is BACK


def test_complete_layers_are_not_done_again(server: Server, work: Path) -> None:
    for moment in range(6, 40):
        assert server.run(*ARGS, folder=work, die_at=moment)[0] == -signal.SIGKILL
        if len(json.loads((work / ".out.partial" / ".journal.json").read_text())["shards"]) == 2:
            break
    before = {path.name: path.stat().st_mtime_ns for path in (work / ".out.partial").glob("0*.safetensors")}
    assert server.run(*ARGS, "--resume", folder=work, die_at=8)[0] == -signal.SIGKILL
    after = {path.name: path.stat().st_mtime_ns for path in (work / ".out.partial").glob("0*.safetensors")}
    assert {name: after[name] for name in list(before)[:2]} == {name: before[name] for name in list(before)[:2]}
    code, out, err = server.run(*ARGS[:3], "0.5", *ARGS[4:], "--resume", folder=work)
    assert code == 2 and "begun with another recipe or other inputs" in err
    assert json.loads(out)["error"]["exit_code"] == 2
    shutil.rmtree(work / ".out.partial")
