"""What a run takes for its own, in the target's folder and in what an earlier run left, and what it must not."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SINGLE, fine_tuned, hashes, write_model, write_recipe

import mergebench
from mergebench import api, load, plan
from mergebench.adapters import extract_adapter
from mergebench.checkpoint.content import put
from mergebench.checkpoint.files import copy_file, write_atomically
from mergebench.checkpoint.staging import scratch, sealed
from mergebench.checkpoint.target import finished
from mergebench.errors import DiskFull, MergebenchError, RecipeError, RunError
from mergebench.evaluation.search.history import held
from mergebench.recipe import tokenizers
from mergebench.systems.pafi import make_mask
from tests.conftest import Cli

PARTIAL = Path(".out.partial")


class Stop(Exception):
    pass


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base = {f"layers.{i}.weight": torch.randn(64, 64) for i in range(4)}
    write_model(Path("base"), base)
    write_model(Path("ft"), fine_tuned(base, 1))
    write_recipe(Path("recipe.yaml"), "task_arithmetic", ["ft"], "base")
    write_recipe(Path("emr.yaml"), "emr", ["ft", "base"], "base")
    write_recipe(Path("ties.yaml"), "ties", ["ft"], "base", scope="model", parameters={"density": 0.3})
    return tmp_path


def merge(recipe: str, out: str = "out", **how: Any) -> None:
    api.run(plan(load(recipe), shard_size=17_000, workers=1, chunk=1024), out, **how)


def stopped(recipe: str) -> dict[str, Any]:
    """A run that ended when about half of its shards were complete; its journal."""

    def progress(_: int) -> None:
        journal = json.loads((PARTIAL / ".journal.json").read_text())
        if len([name for name in journal["shards"] if "/" not in name]) == 2:
            raise Stop

    with pytest.raises(Stop):
        merge(recipe, progress=progress)
    found: dict[str, Any] = json.loads((PARTIAL / ".journal.json").read_text())
    return found


def weights(out: str) -> dict[str, str]:
    return {name: value for name, value in hashes(Path(out)).items() if name.endswith(".safetensors")}


def zero_the_second_half(file: Path) -> None:
    """As a power cut may leave it: size and time are there, the data are not."""
    status, content = file.stat(), file.read_bytes()
    half = len(content) // 2
    file.write_bytes(content[:half] + bytes(len(content) - half))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


# -- what an earlier run left ------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["recipe.yaml", "emr.yaml"])
def test_a_damaged_shard_is_made_again(place: Path, recipe: str) -> None:
    merge(recipe, "whole")
    shards = list(stopped(recipe)["shards"])
    good, bad = PARTIAL / shards[0], PARTIAL / shards[-1]  # of emr, the last task's mask beside its vector
    zero_the_second_half(bad)
    inode = good.stat().st_ino
    merge(recipe, resume=True)
    assert weights("out") == weights("whole")
    assert Path("out", shards[0]).stat().st_ino == inode


@pytest.mark.parametrize("where", ["answers", "shards", "other kinds"])
def test_a_damaged_journal_is_not_gone_on_with(place: Path, where: str) -> None:
    merge("ties.yaml", "whole")
    journal = stopped("ties.yaml")
    if where == "answers":
        (answer,) = journal["answers"]["model"]
        answer["order_statistics"] = [[2 * value for value in part] for part in answer["order_statistics"]]
    elif where == "shards":
        journal["shards"] = list(journal["shards"])
    else:
        journal["answers"] = [1, 2]
    (PARTIAL / ".journal.json").write_text(json.dumps(journal))
    merge("ties.yaml", resume=True)
    assert weights("out") == weights("whole")


def test_a_sealed_journal_is(place: Path) -> None:
    """The same file written by hand: what fails above is not the writing."""
    journal = stopped("recipe.yaml")
    inodes = {name: (PARTIAL / name).stat().st_ino for name in journal["shards"]}
    journal.pop("sha256")
    (PARTIAL / ".journal.json").write_text(sealed(journal))
    merge("recipe.yaml", resume=True)
    assert inodes == {name: Path("out", name).stat().st_ino for name in inodes}


def test_a_directory_for_a_while(place: Path) -> None:
    """It lies beside the output, and what a killed run left there goes with the next one."""
    with scratch(Path("out")) as folder:
        assert folder.parent == place
        (folder / "model").write_bytes(b"large")
        shutil.copytree(folder, "left")
    assert not folder.exists()
    Path("left").rename(folder)
    with scratch(Path("out")) as again:
        assert again == folder and not (folder / "model").exists()
        with pytest.raises(RunError, match="another run is writing it"), scratch(Path("out")):
            pass
    with pytest.raises(Stop), scratch(Path("out")):
        raise Stop
    assert not folder.exists()


# -- what is not ours --------------------------------------------------------------------------------


def test_a_strangers_directory_under_the_name_of_a_replaced_result(place: Path, cli: Cli) -> None:
    old = Path(".out.old")
    old.mkdir()
    (old / "mine.txt").write_text("years of work")
    merge("recipe.yaml")
    assert (old / "mine.txt").read_text() == "years of work"
    before = hashes(Path("out"))
    done = cli("merge", "recipe.yaml", "--out", "out", "--overwrite", "-q")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {place}/.out.old: it exists and mergebench did not make it\nhint: ")
    assert hashes(Path("out")) == before and (old / "mine.txt").exists()
    (old / "mine.txt").unlink()
    old.rmdir()
    assert cli("merge", "recipe.yaml", "--out", "out", "--overwrite", "-q").code == 0


@pytest.mark.parametrize("to", ["done", "nowhere"])
def test_a_link_under_the_name_of_the_partial_directory(place: Path, cli: Cli, to: str) -> None:
    merge("recipe.yaml", "done")
    before = hashes(Path("done"))
    PARTIAL.symlink_to(to)
    done = cli("merge", "recipe.yaml", "--out", "out", "-q")
    assert done.code == 2 and f"{place}/.out.partial: it is a link" in done.err
    assert hashes(Path("done")) == before and not Path("out").exists()


def test_a_link_under_the_name_of_a_replaced_result(place: Path, cli: Cli) -> None:
    for out in ("done", "out"):
        merge("recipe.yaml", out)
    Path(".out.old").symlink_to("done")
    done = cli("merge", "recipe.yaml", "--out", "out", "--overwrite", "-q")
    assert done.code == 2 and ".out.old: it exists" in done.err
    assert Path("done", SINGLE).parent.exists()


def test_a_delta_file_is_no_directory(place: Path, cli: Cli) -> None:
    """A file after a plus and its mask in the working directory: an output beside them is as good as any."""
    make_mask("base", Path("mask.safetensors"), share=0.3)
    extract_adapter("base", "ft", "task", as_="sparse", mask="mask.safetensors")
    shutil.copyfile("task/values.safetensors", "values.safetensors")
    write_recipe(Path("plus.yaml"), "linear", ["base+values.safetensors"])
    assert cli("merge", "plus.yaml", "--out", "deep/out", "-q") == (0, "deep/out\n", "")
    for out in (".", "base", "base/deep"):
        done = cli("merge", "plus.yaml", "--out", out, "--overwrite", "-q")
        assert done.code == 2 and "it overlaps the input" in done.err


def test_a_file_in_the_place_of_a_link_that_leads_nowhere(place: Path, cli: Cli) -> None:
    """To itself, or to what is not there: the file takes the link's place."""
    for out, target in (("a.safetensors", "a.safetensors"), ("b.safetensors", "nowhere")):
        Path(out).symlink_to(target)
        assert cli("mask", "magnitude", "base", "--smallest", "50%", "--out", out, "-q") == (0, f"{out}\n", "")
        assert Path(out).is_file() and not Path(out).is_symlink()
    assert not Path("nowhere").exists()


SHAPES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda found: [found],
    "version": lambda found: found | {"mergebench": 1},
    "recipe": lambda found: found | {"recipe": [1]},
    "models": lambda found: found | {"recipe": {"models": "ft"}},
    "a model": lambda found: found | {"recipe": {"models": ["ft"]}},
    "method": lambda found: found | {"method": "ties"},
    "inputs": lambda found: found | {"inputs": {"a": 1}},
    "an input": lambda found: found | {"inputs": ["a"]},
    "answers": lambda found: found | {"answers": 3},
    "edits": lambda found: found | {"edits": [{"patch": 3}]},
    "notes": lambda found: found | {"notes": "one"},
    "seconds": lambda found: found | {"seconds": "1"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_provenance_of_another_shape(place: Path, cli: Cli, shape: str) -> None:
    """Not a result of ours: it is not replaced, not said to be finished, not reported on."""
    merge("recipe.yaml")
    file = Path("out/mergebench.json")
    assert finished(Path("out")) is not None
    file.write_text(json.dumps(SHAPES[shape](json.loads(file.read_text()))))
    assert finished(Path("out")) is None
    for option in ("--resume", "--overwrite"):
        done = cli("merge", "recipe.yaml", "--out", "out", "-q", option)
        assert done.code == 2 and "it exists and mergebench did not make it" in done.err
    done = cli("report", "out")
    assert done.code == 1 and done.err.count("\n") == 2 and done.err.startswith("error: out/mergebench.json: ")


def test_a_search_that_was_killed_before_its_first_point(place: Path) -> None:
    folder = place / "search"
    (folder / ".candidate/model").mkdir(parents=True)
    (folder / ".search.json.part").write_text("{")
    for how in ({"resume": True}, {"overwrite": True}, {}):
        with held(folder, **{"resume": False, "overwrite": False} | how):
            pass
    (folder / "mine.txt").write_text("years of work")
    with pytest.raises(RecipeError, match="holds no search"), held(folder, resume=True, overwrite=False):
        pass


# -- paths that no file has, and links where a file will be ------------------------------------------

NUL = "a\0b"
PATHS: dict[str, Callable[[], Any]] = {
    "recipe": lambda: load(NUL),
    "model": lambda: plan(load({"merge_method": "passthrough", "models": [{"model": NUL}]})),
    "delta": lambda: plan(load({"merge_method": "passthrough", "models": [{"model": f"base+{NUL}"}]})),
    "patch": lambda: api.plan_patch("base", NUL),
    "probe": lambda: mergebench.read_probe(NUL),
    "suite": lambda: mergebench.measure(NUL, ["base"]),
    "data": lambda: mergebench.fit_probe("base", NUL, "p.safetensors"),
    "out": lambda: merge("recipe.yaml", NUL),
    "out, a file": lambda: mergebench.fit_probe("base", "d.jsonl", f"{NUL}.safetensors"),
    "out, a vector": lambda: api.task_vector("ft", "base", NUL),
    "out, an adapter": lambda: extract_adapter("base", "ft", NUL, rank=2),
    "out, a search": lambda: held(Path(NUL), resume=False, overwrite=False).__enter__(),
}


@pytest.mark.parametrize("what", PATHS)
def test_a_nul_character_in_a_path(place: Path, what: str) -> None:
    with pytest.raises(MergebenchError, match=r"a\\x00b"):
        PATHS[what]()


def test_a_nul_character_in_the_folder_of_results(caplog: pytest.LogCaptureFixture) -> None:
    put(Path(NUL), "x.json", {})
    assert "its path has a NUL character" in caplog.text and "no result is kept" in caplog.text


def test_a_link_at_an_unfinished_file_is_not_followed(place: Path) -> None:
    Path("mine.txt").write_text("years of work")
    for part in (".x.json.part", f".y.json.{os.getpid()}.part"):
        Path(part).symlink_to("mine.txt")
    write_atomically(place / "x.json", "new")
    put(place, "y.json", {})
    assert Path("mine.txt").read_text() == "years of work"
    assert not Path("x.json").is_symlink() and not Path("y.json").is_symlink()


# -- what there is not enough of ---------------------------------------------------------------------


def test_too_few_descriptors_are_known_from_the_start(place: Path) -> None:
    """One line and a way out, before anything is read; with that many it works."""
    recipe, (allowed, most) = load("recipe.yaml"), resource.getrlimit(resource.RLIMIT_NOFILE)
    api.run(plan(recipe, workers=1), "warm")  # what torch opens once
    gc.collect()  # of other tests
    here = len(list(Path("/proc/self/fd").iterdir()))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (here + 2, most))
        with pytest.raises(RunError, match="files would be open at a time") as error:
            plan(recipe, workers=1)
        assert error.value.hint is not None
        needed = int(error.value.hint.removeprefix("allow more: ulimit -n "))
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))
        api.run(plan(recipe, workers=1, shard_size=17_000), "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))


def test_a_full_disk_is_named(place: Path) -> None:
    with pytest.raises(DiskFull, match=r"^/dev/full: cannot be written: No space left"):
        copy_file(Path("recipe.yaml"), Path("/dev/full"))
    with pytest.raises(RunError, match=r"^gone.json: cannot be read: No such file"):
        copy_file(Path("gone.json"), Path("copy.json"))


def test_what_cannot_be_put_in_place_leaves_nothing(place: Path) -> None:
    Path("taken/in").mkdir(parents=True)
    with pytest.raises(RunError, match="taken: cannot be written"):
        write_atomically(Path("taken"), "text")
    assert not Path(".taken.part").exists()


def test_a_tokenizer_that_cannot_be_written(place: Path) -> None:
    """tokenizers raises a bare exception."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"word{number}": number for number in range(1000)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="word0")))
    allowed, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
        with pytest.raises(MergebenchError, match="no tokenizer can be written: File too large") as error:
            tokenizers.saved(tokenizer, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, most))
    assert error.value.hint == "set TMPDIR to another disk"
