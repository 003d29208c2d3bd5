"""A volume mounted where the result should lie: no rename replaces it, so the files are moved out one by one.

Where nothing may be mounted, the rule is told that the directory stays.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models import INDEX, fine_tuned, hashes, names, read_model, tiny_tensors, write_model, write_recipe
from processes import Server

from mergebench.checkpoint import staging, target
from mergebench.checkpoint.staging import Staging, scratch
from mergebench.checkpoint.target import finished
from mergebench.errors import RunError
from mergebench.evaluation.search.history import held
from tests.conftest import Cli

Mount = Callable[..., Path]


def mounted(place: Path, *args: str) -> bool:
    place.mkdir(parents=True, exist_ok=True)
    return os.geteuid() == 0 and not subprocess.run(["mount", *args, place], capture_output=True).returncode


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts what the arguments of `mount` say at tmp_path/NAME."""
    places: list[Path] = []

    def run(name: str, *args: str) -> Path:
        if not mounted(tmp_path / name, *args):
            pytest.skip("only root may mount")
        places.append(tmp_path / name)
        return tmp_path / name

    yield run
    for place in places:
        subprocess.run(["umount", place], check=True)


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of its own, as `docker run -v data:/out` gives it: empty, but for what its file system makes."""
    place = tmp_path / "work" / "vol"
    real = mounted(place, "-t", "tmpfs", "tmpfs")
    if not real:
        monkeypatch.setattr(target, "_is_mount", lambda path: path == place)
    (place / "lost+found").mkdir()
    yield place
    if real:
        subprocess.run(["umount", place], check=True)


def recipe_in(folder: Path, method: str = "task_arithmetic") -> Path:
    base = tiny_tensors()
    write_model(folder / "base", base)
    write_model(folder / "ft", fine_tuned(base, 1))
    return write_recipe(folder / f"{method}.yaml", method, [folder / "ft"], folder / "base")


def test_the_result_lies_in_the_volume(cli: Cli, volume: Path) -> None:
    recipe = recipe_in(volume.parent)
    before = names(volume.parent)
    assert cli("merge", recipe, "-q", "--out", volume) == (0, f"{volume}\n", "")
    expected = {"lost+found", "README.md", "config.json", "mergebench.json", "model.safetensors"}
    assert set(names(volume)) == expected
    assert names(volume.parent) == before
    assert cli("merge", recipe, "-q", "--out", volume).err.startswith(f"error: {volume}: it holds a finished result\n")
    assert cli("merge", recipe, "-q", "--out", volume, "--resume").code == 0
    other = write_recipe(volume.parent / "other.yaml", "linear", [volume.parent / "ft"])
    assert cli("merge", other, "-q", "--out", volume, "--overwrite").code == 0
    assert set(names(volume)) == expected
    assert (finished(volume) or {})["method"]["name"] == "linear"


def test_stages_and_what_is_needed_for_a_while_lie_in_it(cli: Cli, volume: Path) -> None:
    recipe = recipe_in(volume.parent)
    first = json.dumps({"name": "half", **json.loads(recipe.read_text())})
    models = [{"model": "half"}, {"model": str(volume.parent / "ft")}]
    recipe.write_text(f"{first}\n---\n{json.dumps({'merge_method': 'linear', 'models': models})}\n")
    before = names(volume.parent)
    for how in ([], ["--overwrite"], ["--resume"]):
        ran = cli("merge", recipe, "-q", "--out", volume, *how)
        assert (ran.code, ran.err) == (0, "")
    assert finished(volume / ".stages" / "half") is not None
    with scratch(volume) as place:
        assert volume in place.parents
        assert target.contents(volume) and not {path.name for path in target.contents(volume)} & {place.name}
    assert names(volume.parent) == before


def test_a_search_lies_in_it(volume: Path) -> None:
    with held(volume, resume=False, overwrite=False):
        pass


def test_other_files_stay(cli: Cli, volume: Path) -> None:
    recipe = recipe_in(volume.parent)
    (volume / "thesis.txt").write_text("years")
    code, _, err = cli("merge", recipe, "-q", "--out", volume, "--overwrite")
    hint = f"hint: choose a directory in it: --out {volume}/NAME"
    assert (code, err.splitlines()) == (2, [f"error: {volume}: it exists and mergebench did not make it", hint])
    write_model(volume / "model", tiny_tensors())
    inside = write_recipe(volume.parent / "inside.yaml", "linear", [volume / "model"])
    assert cli("merge", inside, "-q", "--out", volume).err.splitlines()[1] == hint
    with Staging(volume, "x", resume=False) as made, pytest.raises(RunError, match="not empty"):
        (made.directory / "model.safetensors").write_bytes(b"")
        made.publish(overwrite=False, sync=False)
    assert (volume / "thesis.txt").read_text() == "years"


def test_a_folder_of_the_same_disk(tmp_path: Path, cli: Cli, mount: Mount) -> None:
    """Two volumes of one disk, one in the other: `os.path.ismount` does not see the inner one."""
    recipe = recipe_in(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    out = mount("a b\\c", "--bind", str(tmp_path / "elsewhere"))
    (tmp_path / "link").symlink_to(out)
    assert not os.path.ismount(out)
    before = set(names(tmp_path))
    for way in (out, tmp_path / "link"):
        assert cli("merge", recipe, "-q", "--out", way, "--overwrite") == (0, f"{way}\n", "")
    assert (finished(tmp_path / "elsewhere") or {})["method"]["name"] == "task_arithmetic"
    assert set(names(tmp_path)) == before


def test_a_folder_whose_parent_may_not_be_written(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """`RUN mkdir /out && chown me /out`: made for a user who may not write beside it."""
    recipe, out = recipe_in(tmp_path), tmp_path / "fixed" / "out"
    out.mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, how: access(path, how) and Path(path) != out.parent)
    monkeypatch.setattr(staging, "partial", lambda at: pytest.fail() if at.parent == out else target.partial(at))
    assert cli("merge", recipe, "-q", "--out", out).code == 0
    assert names(out.parent) == ["out"] and finished(out) is not None


def test_room_is_looked_for_on_its_disk(tmp_path: Path, cli: Cli, mount: Mount) -> None:
    base = {"a": torch.zeros(400, 1000)}
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "ft", fine_tuned(base, 1))
    recipe = write_recipe(tmp_path / "r.yaml", "task_arithmetic", [tmp_path / "ft"], tmp_path / "base")
    out = mount("vol", "-t", "tmpfs", "-o", "size=1m", "small")
    code, _, err = cli("merge", recipe, "-q", "--out", out)
    assert (code, err.split(":")[2]) == (1, " the result needs 0.00 GB, the disk has 0.00 GB\nhint")
    assert names(out) == []


KILLED = [pytest.param(way, marks=pytest.mark.slow) for way in ("ties", "port")]


@pytest.mark.parametrize("way", ["task_arithmetic", *KILLED])
@pytest.mark.parametrize("over", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_every_move(server: Server, tmp_path: Path, volume: Path, way: str, over: bool) -> None:
    """Nothing half moved is taken for a result; the next run ends with the bits of one that was not killed."""
    work = volume.parent
    recipe_in(work, "linear")
    recipe_in(work, "task_arithmetic" if way == "port" else way)
    what = ["merge", f"{way}.yaml"] if way != "port" else ["port", "ft", "--old", "base", "--new", "ft"]
    run = [*what, "--shard-size", "900B", "--out", "vol", "-q", *["--overwrite"] * over]
    first = ["merge", "linear.yaml", "--out", "vol", "-q"]

    def begin() -> None:
        if over:
            assert server.run(*first, "--overwrite", folder=work)[0] == 0
        else:
            for name in set(names(volume)) - {"lost+found"}:
                subprocess.run(["rm", "-r", volume / name], check=True)

    begin()
    counter = tmp_path / "count"
    assert server.run(*run, folder=work, count=str(counter))[0] == 0
    whole, steps = hashes(volume), int(counter.read_text())
    counter.unlink()
    weights = {name for name in whole if name.endswith((".safetensors", INDEX))}
    moves = 14 if over else 10
    interrupted = 0
    for step in range(steps - moves, steps + 1):
        begin()
        old = hashes(volume)
        assert server.run(*run, folder=work, die_at=step)[0] == -signal.SIGKILL
        there = {name: value for name, value in hashes(volume).items() if not name.startswith(".")}
        if "mergebench.json" in there:
            same = old if over and there["mergebench.json"] == old["mergebench.json"] else whole
            assert all(there.get(name) == same[name] for name in same if name in weights)
        else:
            interrupted += bool(there)
            assert "config.json" not in there or weights <= there.keys()
            code, _, err = server.run(*first, folder=work, die_at=1)  # neither result is thrown away unasked
            assert (code, "holds a finished" in err) == ((2, True) if over else (-signal.SIGKILL, False))
        resume = ["--resume"] if way != "port" and step % 2 else []
        done = finished(volume)
        if done is not None and not over:
            resume = ["--overwrite"]
        assert server.run(*run, *resume, folder=work) == (0, "vol\n", "")
        assert {name: hashes(volume)[name] for name in weights} == {name: whole[name] for name in weights}
        kept = done is not None and "--resume" in resume  # nothing was to be done
        assert kept or hashes(volume).keys() == whole.keys()
    assert interrupted > 2
    assert read_model(volume).keys() == tiny_tensors().keys()
