"""A merge on a cluster: the bits of one process, whatever the number of machines, and whoever dies."""

from __future__ import annotations

import os
import platform
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mergebench
from mergebench.checkpoint.staging import Staging
from mergebench.engine import cluster as clusters
from mergebench.engine import executors, on_ray, pool
from mergebench.engine.noise import TILE
from mergebench.errors import RunError
from tests.deltas.kinds import WIDTH, write_world
from tests.editing.conftest import write_probe
from tests.models import fine_tuned, hashes, read_model, write_model

pytestmark = pytest.mark.ray
SURGERY = {"edit": "surgery", "probe": "probe.safetensors", "target": "*.square.weight", "rows": "30%", "alpha": 2.0}


def recipe(method: str, models: list[str], **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "base_model": "base", "models": [{"model": one} for one in models], **more}


RECIPES = {
    "ties, model": recipe("ties", ["ft1", "ft2"], scope="model", parameters={"density": 0.4}),
    "pcb, model": recipe("pcb", ["ft1", "ft2"], scope="model", parameters={"density": 0.3}),
    "emr": recipe("emr", ["ft1", "ft2"]),
    "edits": recipe("linear", ["ft1", "ft2"], edits=[SURGERY]),
    "adapters": recipe("ties", ["base+lora+biases", "ft1"], parameters={"density": 0.5}),
}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Small models of every kind of change, as in tests of deltas."""
    folder = write_world(tmp_path / "world")
    write_probe(folder / "probe.safetensors", torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(7)))
    os.chdir(folder)
    return folder


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Models of 48 chunks: enough for every worker to have several batches."""
    generator = torch.Generator().manual_seed(1)
    base = {f"layers.{number}": torch.randn(8, 2 * TILE, generator=generator) for number in range(6)}
    write_model(tmp_path / "base", base, shards=2)
    write_model(tmp_path / "ft1", fine_tuned(base, 1))
    write_model(tmp_path / "ft2", fine_tuned(base, 2))
    return tmp_path


def contents(out: Path) -> dict[str, str]:
    """All files of a result but those that say when and how it was made."""
    return {name: value for name, value in hashes(out).items() if name not in ("mergebench.json", "README.md")}


@pytest.mark.parametrize("name", RECIPES)
def test_the_bits_of_one_process(name: str, world: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mergebench.merge(RECIPES[name], "alone", workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(executors, "FORK_FROM", 0)
        patch.setattr(executors, "joined", lambda: False)
        mergebench.merge(RECIPES[name], "processes", workers=2)
    assert contents(Path("processes")) == contents(Path("alone"))
    for workers in (1, 2, 5):
        result = mergebench.merge(RECIPES[name], f"on{workers}", workers=workers, on="ray")
        assert contents(result.out) == contents(Path("alone"))


@pytest.mark.parametrize("method", ["ties", "pcb"])
def test_many_batches_on_all_machines(method: str, large: Path, cluster: Any) -> None:
    given = recipe(method, ["ft1", "ft2"], scope="model", parameters={"density": 0.3})
    mergebench.merge(given, "alone", workers=1)
    plan = mergebench.plan(given, workers=5, on="ray", chunk=TILE)
    assert sorted(machine.workers for machine in plan.cluster) == [1, 2, 2]
    seen: list[int] = []
    result = mergebench.run(plan, "out", progress=seen.append)
    assert contents(result.out) == contents(Path("alone"))
    assert sum(seen) == plan.bytes_read


@pytest.mark.slow
def test_a_command_that_is_no_part_of_the_cluster(large: Path, cluster: Any) -> None:
    Path("recipe.yaml").write_text("merge_method: linear\nmodels: [{model: ft1}, {model: ft2}]\n")
    mergebench.merge("recipe.yaml", "alone", workers=1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    server = [sys.executable, "-m", "ray.util.client.server", "--address", cluster.address, "--mode", "proxy"]
    command = [sys.executable, "-m", "mergebench", "merge", "recipe.yaml", "--out", "out", "--workers", "2"]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*server, "--host", "127.0.0.1", "--port", port], **quiet) as listening:
        try:
            on = ["--on", f"ray://127.0.0.1:{port}"]
            merged = subprocess.run([*command, *on], capture_output=True, text=True, check=False)
        finally:
            listening.terminate()
    assert merged.returncode == 0, merged.stderr
    assert contents(Path("out")) == contents(Path("alone"))
    assert "ray" not in (merged.stdout + merged.stderr).lower().replace("ray://", "")


@pytest.mark.parametrize("sweep", ["questions", "apply"])
def test_a_machine_dies(
    sweep: str, large: Path, cluster: Any, lose: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "BATCH", 1)  # so that what is lost is more than what was on its way
    monkeypatch.setattr(on_ray, "LARGEST", 1)
    given = recipe("pcb", ["ft1", "ft2"], scope="model", parameters={"density": 0.3})
    mergebench.merge(given, "alone", workers=1)
    mergebench.merge(given, "warm", workers=5, on="ray")  # all workers have started
    plan = mergebench.plan(given, workers=5, on="ray", chunk=TILE)
    done = 0

    def progress(size: int) -> None:
        nonlocal done
        before, done = done, done + size
        limit = plan.bytes_read * (0.55 if sweep == "questions" else 0.85)  # amid it: workers hold results
        if before < limit <= done:
            lose()

    result = mergebench.run(plan, "out", progress=progress)
    assert done == plan.bytes_read
    assert contents(result.out) == contents(Path("alone"))


HOLDING = """
import os, signal
from dataclasses import dataclass
from pathlib import Path
from mergebench import gram, merge_method
from mergebench.engine import on_ray

def die(when):  # the first worker that comes here
    kill = Path(f"kill {when}")
    if kill.exists() and kill.read_text() != str(os.getpid()):
        kill.rename(f"killed{os.getpid()}")
        os.kill(os.getpid(), signal.SIGKILL)

if Path("kill at the end").exists():
    end = on_ray.Hand.end
    on_ray.Hand.end = lambda hand: die("at the end") or end(hand)

@dataclass(frozen=True)
class Params:
    pass

asked = []

@merge_method(takes="task_vectors", paper="none")
def scaled(tvs, params: Params, ctx):
    asked.append(1)
    if len(asked) > 4:
        die("amid")
    dots = yield gram(tvs)
    return tvs.sum(0) / dots[0, 0].sqrt()
"""


@pytest.mark.parametrize("when", ["amid", "at the end"])
def test_what_a_dead_worker_held_is_gathered_again(
    when: str, large: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One dies at a question after it has answered four, or when it is asked for all: every answer counts once."""
    monkeypatch.setattr(on_ray, "BATCH", 1)
    monkeypatch.setattr(on_ray, "LARGEST", 1)
    Path("mine.py").write_text(HOLDING)
    given = recipe("mine.py:scaled", ["ft1", "ft2"], scope="model")
    mergebench.merge(given, "alone", workers=1)
    Path(f"kill {when}").write_text(str(os.getpid()))  # but not this one
    result = mergebench.run(mergebench.plan(given, workers=2, on="ray", chunk=TILE), "out")
    assert len(list(Path().glob("killed*"))) == 1
    assert contents(result.out) == contents(Path("alone"))


KILLING = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from mergebench import merge_method

@dataclass(frozen=True)
class Params:
    pass

@merge_method(takes="weights", paper="none")
def mean(chunk, params: Params, ctx):
    if Path("kill").exists() and ctx.spans[0].tensor == Path("kill").read_text():
        time.sleep(0.5)  # all batches are handed out before it dies
        os.kill(os.getpid(), signal.SIGKILL)
    return chunk.mean(0)
"""


@pytest.mark.parametrize("name", ["layers.3", "alone"])  # amid others; and where it is noticed at the end alone
def test_a_chunk_that_kills_every_worker(
    name: str, large: Path, cluster: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that takes too much memory: the run gives up, what is done is kept, nothing of Ray's is printed."""
    monkeypatch.setattr(pool, "DEATHS", 2)
    Path("mine.py").write_text(KILLING)
    given = {"merge_method": "mine.py:mean", "models": [{"model": "base"}, {"model": "ft1"}]}  # of two shards
    if name == "alone":
        write_model(Path("ft1"), {name: torch.ones(2, TILE)})
        given["models"] = [{"model": "ft1"}]
    mergebench.merge(given, "alone", workers=1)
    Path("kill").write_text(name)
    with pytest.raises(RunError, match=rf"{re.escape(name)}.*: each worker there dies") as raised:
        mergebench.run(mergebench.plan(given, workers=1, on="ray", chunk=TILE), "out")
    assert "\n" not in str(raised.value) and "--resume" in str(raised.value.hint)
    assert Path(".out.partial").is_dir() == (name != "alone") and not Path("out").exists()
    Path("kill").unlink()
    result = mergebench.merge(given, "out", workers=2, on="ray", resume=True)
    assert contents(result.out) == contents(Path("alone"))
    printed = capfd.readouterr()
    assert printed.out == "" and "ray" not in printed.err.lower()


DRIVER = """
import os, signal, sys
import mergebench
plan = mergebench.plan("recipe.yaml", workers=3, on="ray", chunk=65536)
done = 0
def progress(size):
    global done
    done += size
    if done > float(sys.argv[1]) * plan.bytes_read:
        os.kill(os.getpid(), signal.SIGKILL)
mergebench.run(plan, "out", progress=progress)
"""


@pytest.mark.parametrize("on", [pytest.param("ray", marks=pytest.mark.slow), None])
def test_the_driver_dies_and_another_goes_on(on: str | None, large: Path, cluster: Any) -> None:
    Path("recipe.yaml").write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: ft1}, {model: ft2}]\nscope: model\n"
        "parameters: {density: 0.3}\n"
    )
    mergebench.merge("recipe.yaml", "alone", workers=1)
    killed = subprocess.run([sys.executable, "-c", DRIVER, "0.9"], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not Path("out").exists() and any(Path(".out.partial").iterdir())
    read: list[int] = []
    result = mergebench.merge("recipe.yaml", "out", workers=2, on=on, resume=True, progress=read.append)
    assert contents(result.out) == contents(Path("alone"))
    whole = mergebench.plan("recipe.yaml").bytes_read
    assert sum(read) < 0.6 * whole  # the questions, and the first shard, were answered and written before


def test_workers_of_a_killed_run_write_no_more(large: Path, cluster: Any) -> None:
    """The next run begins with removing the marker."""
    hand = on_ray.Hand(mergebench.plan(recipe("linear", ["ft1"]), workers=1))
    with clusters.marked(Path(".out.partial")) as marker:
        pass
    with Staging(Path("out"), "", False) as staging:
        (staging.directory / marker.file.name).touch()
    with Staging(Path("out"), "", False), pytest.raises(RunError, match="a later run has taken it over"):
        hand.step("apply", [], b"", marker)


def test_storage_that_is_not_shared(large: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marker is written where the workers do not look, as if their disk were another."""
    monkeypatch.setattr(Path, "touch", lambda *_: None)
    with pytest.raises(RunError, match=r"\.out\.partial: .* has another folder there") as raised:
        mergebench.merge(recipe("linear", ["ft1", "ft2"]), "out", workers=2, on="ray")
    assert raised.value.hint == clusters.SHARE and not Path("out").exists()


def test_inputs_of_another_machine(large: Path) -> None:
    """A worker sees other files than the command saw."""
    hand = on_ray.Hand(mergebench.plan(recipe("linear", ["ft1", "ft2"]), workers=1))
    os.utime("ft2/model.safetensors", ns=(0, 0))
    with pytest.raises(RunError, match=rf"^{platform.node()}: ft2/model.safetensors") as raised:
        hand.step("apply", [], b"", None)
    assert raised.value.hint == clusters.SHARE


def test_an_error_of_a_worker_is_the_error_of_a_process(large: Path, cluster: Any) -> None:
    tensors = {name: value.clone() for name, value in read_model(Path("ft2")).items()}
    tensors["layers.4"][3, 7] = float("nan")
    write_model(Path("bad"), tensors)
    given = recipe("ties", ["ft1", "bad"])
    with pytest.raises(RunError) as here:
        mergebench.merge(given, "here", workers=1)
    with pytest.raises(RunError) as there:
        mergebench.merge(given, "there", workers=3, on="ray")
    assert str(there.value) == str(here.value) and there.value.hint == here.value.hint


def test_two_runs_of_one_output(large: Path, cluster: Any) -> None:
    given = recipe("linear", ["ft1", "ft2"])
    with Staging(Path("out"), "another", False) as held:
        before = sorted(path.name for path in held.directory.iterdir())
        with pytest.raises(RunError, match="another run is writing it"):
            mergebench.merge(given, "out", workers=2, on="ray")
        assert sorted(path.name for path in held.directory.iterdir()) == before
