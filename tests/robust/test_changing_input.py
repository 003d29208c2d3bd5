"""Inputs that are changed, replaced or copied: what was planned is what is merged, or nothing is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SINGLE, fine_tuned, hashes, read_model, write_model, write_recipe

import mergebench
from mergebench import api, load, plan
from mergebench.checkpoint.content import Contents
from mergebench.deltas.open import open_model
from mergebench.engine import executors
from mergebench.engine.plan import Plan
from mergebench.errors import RunError
from tests.conftest import Cli


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base = {f"layers.{i}.weight": torch.randn(64, 64) for i in range(4)}
    write_model(Path("base"), base)
    write_model(Path("ft"), fine_tuned(base, 1))
    write_model(Path("other"), fine_tuned(base, 2))
    write_recipe(Path("recipe.yaml"), "task_arithmetic", ["ft"], "base")
    return tmp_path


def overwrite(file: Path) -> None:
    """Other values in the same place."""
    file.write_bytes(Path("other", SINGLE).read_bytes())


def overwrite_and_set_back(file: Path) -> None:
    status = file.stat()
    overwrite(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(file: Path) -> None:
    """Another file of the same size and time under the name."""
    status = file.stat()
    copy = shutil.copyfile(Path("other", SINGLE), Path("copy"))
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(file)


def take_away(file: Path) -> None:
    file.unlink()


Change = Callable[[Path], None]
CHANGES: list[Change] = [overwrite, overwrite_and_set_back, replace, take_away]


def check_refused(planned: Plan, **how: object) -> None:
    what = "ft/model.safetensors: (it was changed, replaced or|its rights or links|cannot be read: No such file)"
    with pytest.raises(RunError, match=what) as error:
        api.run(planned, "out", **how)  # type: ignore[arg-type]
    assert "\n" not in error.value.message
    assert not Path("out").exists()


@pytest.mark.parametrize("change", CHANGES)
def test_changed_after_planning(place: Path, change: Change) -> None:
    planned = plan(load("recipe.yaml"))
    change(Path("ft", SINGLE))
    check_refused(planned)


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_while_merging(place: Path, change: Change, forked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if forked:
        monkeypatch.setattr(executors, "FORK_FROM", 0)
    changes = [change]

    def progress(_: int) -> None:
        if changes:
            changes.pop()(Path("ft", SINGLE))

    check_refused(plan(load("recipe.yaml"), workers=2 if forked else 1, chunk=1024), progress=progress)
    assert not changes


def link(file: Path) -> None:
    os.link(file, "linked")


def protect(file: Path) -> None:
    file.chmod(0o444)


@pytest.mark.parametrize("touch", [link, protect])
def test_touched_while_merging(place: Path, touch: Change) -> None:
    """Not to be told from other data under an old date; what is done is kept, and the result is the same."""
    mergebench.run(plan(load("recipe.yaml")), "whole")
    changes = [touch]

    def progress(_: int) -> None:
        journal = json.loads(Path(".out.partial/.journal.json").read_text())
        if changes and len(journal["shards"]) == 2:
            changes.pop()(Path("ft", SINGLE))

    def merge(**how: Any) -> Path:
        return api.run(plan(load("recipe.yaml"), workers=1, chunk=1024, shard_size=17_000), "out", **how).out

    with pytest.raises(RunError, match="its rights or links were changed after its header was read, or") as error:
        merge(progress=progress)
    assert "--resume" in str(error.value.hint)
    out = merge(resume=True)
    assert all(torch.equal(value, read_model(Path("whole"))[name]) for name, value in read_model(out).items())


def test_a_reader_notices(place: Path) -> None:
    """Without a plan."""
    model = open_model("ft")
    overwrite(Path("ft", SINGLE))
    with pytest.raises(RunError, match="it was changed, replaced or taken away"):
        model.state_dict()
    with pytest.raises(RunError, match="it was changed, replaced or taken away"):
        Contents(None).of_model(model)


@pytest.mark.parametrize("change", [overwrite_and_set_back, replace])
def test_what_is_known_of_a_file_is_not_said_of_another(place: Path, change: Change, cli: Cli) -> None:
    """Under one name, size and time."""
    contents = Contents(Path("results"))
    before = contents.of_model(open_model("ft"))
    assert cli("merge", "recipe.yaml", "--out", "out", "-q").code == 0
    merged = hashes(Path("out"))
    change(Path("ft", SINGLE))
    assert Contents(Path("results")).of_model(open_model("ft")) != before
    assert Contents(Path("results")).of_model(open_model("ft")) == Contents(None).of_model(open_model("ft"))
    done = cli("merge", "recipe.yaml", "--out", "out", "--resume", "-q")
    assert done.code == 2 and "it holds a finished result" in done.err
    assert hashes(Path("out")) == merged
    assert cli("merge", "recipe.yaml", "--out", "out", "--overwrite", "-q").code == 0
    expected = read_model(Path("other"))
    torch.testing.assert_close(read_model(Path("out")), expected)


def test_a_copy_is_the_same(place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory copied with its times, to go on elsewhere: what was merged and measured is known there."""
    contents = Contents(Path("results")).of_model(open_model("ft"))
    assert cli("merge", "recipe.yaml", "--out", "out", "-q").code == 0
    shutil.copytree(place, place / "there")
    monkeypatch.chdir(place / "there")
    assert Contents(Path("results")).of_model(open_model("ft")) == contents
    done = cli("merge", "recipe.yaml", "--out", "out", "--resume")
    assert done.code == 0 and "already finished" in done.err


def test_what_was_merged_is_told(place: Path, cli: Cli) -> None:
    assert cli("merge", "recipe.yaml", "--out", "out", "-q").code == 0
    for entry in json.loads(Path("out/mergebench.json").read_text())["inputs"]:
        status = Path(entry["file"]).stat()
        assert (entry["size"], entry["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
        assert len(entry["sample_sha256"]) == 64
