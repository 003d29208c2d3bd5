"""kill -9 at any moment, then --resume: the same bits as undisturbed, and nothing ever looks finished that is not.

Two ways to die: at each change to the file system in turn (an audit hook counts them and kills), and at
random moments of the clock, which also fall into the arithmetic and into half-written shards.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import INDEX, SINGLE, fine_tuned, hashes, read_model, write_model, write_recipe
from processes import Server, check_at_work

from mergebench.editing.probes.probe import Probe

METHODS = {
    "pcb": {},
    "emr": {},
    "consensus_ta": {"lines": {"alpha": "auto", "beta": 0.5}},
    "ties": {"parameters": {"density": 0.3}},
    "edited": {
        "merge_method": "linear",
        "edits": [
            {"edit": "surgery", "probe": "one.safetensors", "target": "layers.*", "rows": "30%", "alpha": 2.0},
            {"edit": "surgery", "probe": "two.safetensors", "target": "layers.*", "rows": "40%", "select": "max-cos"},
        ],  # of the rows of one, some are the other's too
    },
}
RUNS = (*METHODS, "port")
OPTIONS = ("--workers", "1", "-q")
TIMES = ("seconds", "stages", "peak_memory")  # of mergebench.json: what no two runs share


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand elements: for dying at every step."""
    random = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(16, 24, generator=random).bfloat16() for i in range(6)}
    return _lay_out(tmp_path_factory.mktemp("small") / "work", base)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three times 25 MB: a third of a second of work."""
    random = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(1024, 1024, generator=random).bfloat16() for i in range(12)}
    return _lay_out(tmp_path_factory.mktemp("large") / "work", base)


def _lay_out(folder: Path, base: dict[str, torch.Tensor]) -> Path:
    side_files = {"tokenizer.json": "{}", "README.md": "not to be copied"}
    write_model(folder / "base", base, shards=[list(base)[:2], list(base)[2:]], side_files=side_files)
    write_model(folder / "ft1", fine_tuned(base, 1), shards=3)
    write_model(folder / "ft2", fine_tuned(base, 2))
    for method, more in METHODS.items():
        write_recipe(folder / f"{method}.yaml", method, ["ft1", "ft2"], "base", **more)
    for seed, name in enumerate(("one", "two")):
        weight = torch.randn(2, base["layers.0.weight"].shape[1], generator=torch.Generator().manual_seed(seed))
        Probe(weight, torch.zeros(2)).save(folder / f"{name}.safetensors")
    return folder


def contents(out: Path) -> dict[str, Any]:
    """Every file of a result, mergebench.json without its times."""
    found: dict[str, Any] = hashes(out)
    provenance = json.loads((out / "mergebench.json").read_text())
    found["mergebench.json"] = {key: value for key, value in provenance.items() if key not in TIMES}
    found["README.md"] = re.sub(rf"(?<!-)\b{out.name}\b", "NAME", (out / "README.md").read_text())
    return found


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def clean(folder: Path, out: str) -> None:
    assert not leftovers(folder)
    shutil.rmtree(folder / out)


def command(run: str, out: str, options: Sequence[str] = OPTIONS) -> list[str]:
    """Twelve or so shards: the base's two files, cut again."""
    what = ["port", "ft1", "--old", "base", "--new", "ft2"] if run == "port" else ["merge", f"{run}.yaml"]
    return [*what, "--out", out, "--shard-size", "2MB", *options]


@pytest.fixture(scope="module")
def undisturbed(server: Server, small: Path, large: Path) -> dict[tuple[Path, str], dict[str, Any]]:
    """What every run must give, by place and method; merged with all workers and an ample budget."""
    found = {}
    for folder in (small, large):
        for run in RUNS:
            assert server.run(*command(run, "whole", ["-q"]), folder=folder) == (0, "whole\n", "")
            found[folder, run] = contents(folder / "whole")
            clean(folder, "whole")
    return found


def steps(server: Server, folder: Path, *args: str) -> int:
    """How many changes to the file system a run makes."""
    counter = folder.parent / "count"
    assert server.run(*args, folder=folder, count=str(counter))[0] == 0
    return int(counter.read_text())


def check_crash(folder: Path, out: str, allowed: list[dict[str, Any]]) -> None:
    """After a kill, what is at the target is nothing, or a whole result."""
    target = folder / out
    if target.exists():
        assert contents(target) in allowed


# -- at every change to the file system --------------------------------------------------------------


def die_at_every_step(
    server: Server, folder: Path, whole: dict[str, Any], method: str, chosen: slice | random.Random
) -> None:
    total = steps(server, folder, *command(method, "out"))
    assert contents(folder / "out") == whole
    assert total > 15
    clean(folder, "out")
    moments = list(range(1, total + 1))
    moments = chosen.sample(moments, 4) if isinstance(chosen, random.Random) else moments[chosen]
    for moment in moments:
        code, _, _ = server.run(*command(method, "out"), folder=folder, die_at=moment)
        assert code == -signal.SIGKILL, f"step {moment} of {total}"
        check_crash(folder, "out", [whole])
        assert server.run(*command(method, "out"), "--resume", folder=folder) == (0, "out\n", ""), f"step {moment}"
        assert contents(folder / "out") == whole, f"step {moment} of {total}"
        clean(folder, "out")


@pytest.mark.parametrize("method", RUNS)
def test_killed_at_some_steps(server: Server, small: Path, undisturbed: Any, method: str) -> None:
    """The last three steps (provenance, journal, rename) and a seeded choice of the others."""
    die_at_every_step(server, small, undisturbed[small, method], method, random.Random(method))
    die_at_every_step(server, small, undisturbed[small, method], method, slice(-4, None))


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_killed_at_every_step(server: Server, small: Path, undisturbed: Any, method: str) -> None:
    die_at_every_step(server, small, undisturbed[small, method], method, slice(None))


def test_killed_while_replacing_an_earlier_result(server: Server, small: Path, undisturbed: Any) -> None:
    """With --overwrite, the target is the earlier result, nothing for a moment, or the new one."""
    whole = undisturbed[small, "ties"]
    earlier = ["merge", "ties.yaml", "--out", "out", "--set", "parameters.density=0.9", *OPTIONS]
    again = [*command("ties", "out"), "--overwrite"]
    assert server.run(*earlier, folder=small)[0] == 0
    old = contents(small / "out")
    total = steps(server, small, *again)
    for moment in range(total - 4, total + 1):
        assert server.run(*earlier, "--overwrite", folder=small)[0] == 0
        assert contents(small / "out") == old
        assert server.run(*again, folder=small, die_at=moment)[0] == -signal.SIGKILL
        check_crash(small, "out", [old, whole])
        assert server.run(*again, "--resume", folder=small)[0] == 0
        assert contents(small / "out") == whole, f"step {moment} of {total}"
        assert not [name for name in leftovers(small) if name.endswith(".partial")]
        assert server.run(*again, folder=small)[0] == 0  # an .old of a kill after the rename goes with the next run
        assert not leftovers(small)
    clean(small, "out")


# -- at random moments -------------------------------------------------------------------------------


def die_at_random(
    server: Server, folder: Path, whole: dict[str, Any], method: str, kills: int, seed: int, forked: bool = False
) -> None:
    """Kill the run and every resumption of it at random moments, `kills` times in all."""
    moments = random.Random(seed)
    workers = ["--workers", "2"] if forked else []
    started = time.monotonic()
    assert server.run(*command(method, "out"), *workers, folder=folder, forked=forked)[0] == 0
    took = time.monotonic() - started
    clean(folder, "out")
    killed = 0
    while killed < kills:
        resume = ["--resume"] if (folder / ".out.partial").exists() else []
        run = server.start(*command(method, "out"), *workers, *resume, folder=folder, forked=forked)
        time.sleep(moments.uniform(0.1, 1.0) * took)
        run.signal(signal.SIGKILL)
        code, _, err = run.wait()
        killed += code == -signal.SIGKILL
        assert err == ""
        check_at_work(folder, 0)  # forked workers end with the process that started them
        check_crash(folder, "out", [whole])
        if (folder / "out").exists():  # it was done before the signal came
            clean(folder, "out")
    assert server.run(*command(method, "out"), "--resume", folder=folder) == (0, "out\n", "")
    assert contents(folder / "out") == whole
    clean(folder, "out")


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("method", RUNS)
def test_killed_at_random(server: Server, large: Path, undisturbed: Any, method: str, forked: bool) -> None:
    die_at_random(server, large, undisturbed[large, method], method, kills=2, seed=7, forked=forked)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("method", RUNS)
def test_killed_at_random_often(
    server: Server, large: Path, undisturbed: Any, method: str, forked: bool, seed: int
) -> None:
    die_at_random(server, large, undisturbed[large, method], method, kills=12, seed=seed, forked=forked)


def test_resume_goes_on(server: Server, large: Path, undisturbed: Any) -> None:
    """Shards that were complete are not written again, answers that were known not asked again."""
    for method in METHODS.keys() - {"edited"}:  # whose rows are written again
        total = steps(server, large, *command(method, "out"))
        clean(large, "out")
        assert server.run(*command(method, "out"), folder=large, die_at=total * 2 // 3)[0] == -signal.SIGKILL
        journal = json.loads((large / ".out.partial" / ".journal.json").read_text())
        assert len(journal["shards"]) >= 3
        before = {name: (large / ".out.partial" / name).stat() for name in journal["shards"]}
        assert server.run(*command(method, "out"), "--resume", folder=large)[0] == 0
        for name, status in before.items():
            now = (large / "out" / name).stat()
            assert (now.st_ino, now.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
        assert contents(large / "out") == undisturbed[large, method]
        clean(large, "out")


# -- what --resume will and will not do --------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of its own, killed half-way: five of nine shards are complete."""
    random = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(16, 24, generator=random) for i in range(9)}
    folder = tmp_path_factory.mktemp("killed") / "work"
    write_model(folder / "base", base)
    write_model(folder / "ft1", fine_tuned(base, 1))
    write_model(folder / "ft2", fine_tuned(base, 2))
    write_recipe(folder / "ties.yaml", "ties", ["ft1", "ft2"], "base", parameters={"density": 0.3})
    for moment in range(20, 60, 2):
        assert server.run(*half_way(), folder=folder, die_at=moment)[0] == -signal.SIGKILL
        if len(json.loads((folder / ".out.partial" / ".journal.json").read_text())["shards"]) == 5:
            return folder
    raise AssertionError("it never had five of nine shards")


@pytest.fixture
def interrupted(killed: Path, tmp_path: Path) -> Path:
    """The killed run, for this test alone."""
    return shutil.copytree(killed, tmp_path / "work")


def half_way(*more: str) -> list[str]:
    return ["merge", "ties.yaml", "--out", "out", "--shard-size", "1600", *OPTIONS, *more]


CHANGES = {
    "density": ["--set", "parameters.density=0.4"],
    "seed": ["--seed", "5"],
    "stored type": ["--set", "out_dtype=bfloat16"],
    "scope": ["--set", "scope=model"],
    "exclusion": ["--set", "exclude=['layers.8.*']"],
    "more, smaller shards": ["--shard-size", "1500"],
    "one shard": ["--shard-size", "1MB"],
    "order of the models": ["--set", "models.0.model=ft2", "--set", "models.1.model=ft1"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_recipe_is_not_resumed(server: Server, interrupted: Path, change: str) -> None:
    if change == "more, smaller shards":
        assert server.run(*half_way(*CHANGES[change], "--resume"), folder=interrupted)[0] == 0  # 1536 bytes each
        return
    before = hashes(interrupted)
    code, out, err = server.run(*half_way(*CHANGES[change], "--resume"), folder=interrupted)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and "begun with another recipe or other inputs" in err
    assert err.count("\n") == 2 and "hint: run without --resume" in err
    assert hashes(interrupted) == before
    assert server.run(*half_way(*CHANGES[change]), folder=interrupted)[0] == 0
    files = {path.name for path in (interrupted / "out").glob("*.safetensors")}
    index = interrupted / "out" / INDEX  # nothing of the interrupted run stays
    assert files == (set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {SINGLE})


def test_the_same_number_of_other_shards_is_not_resumed(server: Server, tmp_path: Path) -> None:
    """Cut elsewhere, two shards are still called 1 of 2 and 2 of 2."""
    base = {name: torch.randn(size) for name, size in {"a": 100, "b": 100, "c": 100, "d": 100}.items()}
    folder = tmp_path / "work"
    write_model(folder / "base", base)
    write_model(folder / "ft1", fine_tuned(base, 1))
    write_recipe(folder / "linear.yaml", "linear", ["base", "ft1"])

    def args(size: int) -> list[str]:
        return ["merge", "linear.yaml", "--out", "out", "--shard-size", str(size), *OPTIONS]

    for moment in range(5, 30):
        server.run(*args(800), folder=folder, die_at=moment)
        if "model-00001-of-00002.safetensors" in (folder / ".out.partial" / ".journal.json").read_text():
            break
    code, _, err = server.run(*args(1200), "--resume", folder=folder)
    assert code == 2 and "begun with another recipe" in err
    assert server.run(*args(800), "--resume", folder=folder)[0] == 0
    assert read_model(folder / "out").keys() == base.keys()


def test_other_inputs_are_not_resumed(server: Server, interrupted: Path) -> None:
    base = read_model(interrupted / "base")
    write_model(interrupted / "ft2", fine_tuned(base, 3))  # the same names, shapes and sizes
    code, out, err = server.run(*half_way("--resume"), folder=interrupted)
    assert (code, out) == (2, "") and "begun with another recipe or other inputs" in err
    assert server.run(*half_way(), folder=interrupted)[0] == 0


def test_workers_memory_and_device_may_change(server: Server, interrupted: Path) -> None:
    assert server.run(*half_way(), "--overwrite", folder=interrupted)[0] == 0
    whole = contents(interrupted / "out")
    clean(interrupted, "out")
    for moment in (14, 20, 26):
        assert server.run(*half_way(), folder=interrupted, die_at=moment)[0] == -signal.SIGKILL
        other = ["--workers", "2", "--memory", "40MiB", "--device", "cpu", "--resume"]
        assert server.run(*half_way(*other), folder=interrupted)[:2] == (0, "out\n")
        assert contents(interrupted / "out") == whole
        clean(interrupted, "out")


def test_without_resume_it_starts_afresh(server: Server, interrupted: Path) -> None:
    before = {path.name: path.stat().st_ino for path in (interrupted / ".out.partial").glob("*.safetensors")}
    assert server.run(*half_way(), folder=interrupted)[0] == 0
    after = {path.name: path.stat().st_mtime_ns for path in (interrupted / "out").glob("*.safetensors")}
    assert before.keys() <= after.keys()
    assert not leftovers(interrupted)


def test_nothing_to_resume_starts_afresh(server: Server, small: Path, undisturbed: Any) -> None:
    assert server.run(*command("ties", "fresh"), "--resume", folder=small) == (0, "fresh\n", "")
    assert contents(small / "fresh") == undisturbed[small, "ties"]
    clean(small, "fresh")


@pytest.mark.parametrize("journal", ["", "{", "[]", "{}", '{"fingerprint": 3}'])
def test_a_damaged_journal_is_nothing_to_resume(server: Server, interrupted: Path, journal: str) -> None:
    (interrupted / ".out.partial" / ".journal.json").write_text(journal)
    code, _, err = server.run(*half_way("--resume"), folder=interrupted)
    assert "Traceback" not in err
    assert code == (0 if journal in ("", "{", "[]") else 2)


def test_a_finished_result_says_so(server: Server, small: Path) -> None:
    assert server.run(*command("ties", "done"), folder=small)[0] == 0
    before = hashes(small)
    args = [arg for arg in command("ties", "done") if arg != "-q"]
    code, out, err = server.run(*args, "--resume", folder=small)
    assert (code, out) == (0, "done\n")
    assert "done: already finished, nothing to resume" in err
    assert hashes(small) == before
    code, _, err = server.run(*args, "--resume", "--set", "parameters.density=0.4", folder=small)
    assert code == 2 and "finished result" in err
    clean(small, "done")


# -- Ctrl-C ------------------------------------------------------------------------------------------


LEFT = (  # nothing, where nothing was complete
    r"interrupted(\nleft: \.out\.partial \([\d.]+ [kM]?B\); continue with --resume, or delete it"
    r"|: what is complete is kept; continue with --resume)\n"
)


def check_interrupted(ran: tuple[int, str, str], folder: Path) -> None:
    assert ran[:2] == (130, "") and re.fullmatch(LEFT, ran[2])
    assert not (folder / "out").exists()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_interrupt(server: Server, small: Path, undisturbed: Any, share: float) -> None:
    """Exit 130 and one line, at any moment; what is complete is kept."""
    total = steps(server, small, *command("ties", "out"))
    clean(small, "out")
    moment = round(share * total)
    check_interrupted(server.run(*command("ties", "out"), folder=small, die_at=moment, by=signal.SIGINT), small)
    assert server.run(*command("ties", "out"), "--resume", folder=small)[0] == 0
    assert contents(small / "out") == undisturbed[small, "ties"]
    clean(small, "out")


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end(server: Server, small: Path, undisturbed: Any, by: signal.Signals) -> None:
    """As Ctrl-C, so that temporary files go; the code says which signal it was."""
    code, out, err = server.run(*command("ties", "out"), folder=small, die_at=12, by=by)
    assert (code, out) == (128 + by, "") and re.fullmatch(LEFT, err)
    assert server.run(*command("ties", "out"), "--resume", folder=small)[0] == 0
    assert contents(small / "out") == undisturbed[small, "ties"]
    clean(small, "out")


@pytest.mark.parametrize("forked", [False, True])
def test_interrupt_of_the_arithmetic(server: Server, large: Path, undisturbed: Any, forked: bool) -> None:
    """Threads stop at their next chunk, processes at once."""
    moments = random.Random(1)
    workers = ["--workers", "2"] if forked else []
    for _ in range(20):
        run = server.start(*command("pcb", "out"), *workers, folder=large, forked=forked)
        while not (large / ".out.partial").exists():
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.1))
        run.signal(signal.SIGINT)
        ran = run.wait()
        if ran[0] != 0:
            break
        clean(large, "out")  # it was faster
    check_interrupted(ran, large)
    check_at_work(large, 0)
    assert server.run(*command("pcb", "out"), "--resume", folder=large)[0] == 0
    assert contents(large / "out") == undisturbed[large, "pcb"]
    clean(large, "out")
