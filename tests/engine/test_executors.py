"""Workers in forked processes: the same bits as threads, the same errors, and nothing of them stays."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import fine_tuned, write_model
from processes import at_work, check_at_work
from safetensors.torch import load_file
from torch import Tensor

import mergebench
from mergebench import methods
from mergebench.engine import executors
from mergebench.engine.context import Context
from mergebench.engine.job import Merge
from mergebench.engine.method import TaskVectors, merge_method
from mergebench.engine.noise import TILE
from mergebench.engine.plan import Plan, plan_merge
from mergebench.engine.run import Result, run_plan
from mergebench.engine.statistics import order_statistics
from mergebench.errors import MergebenchError, RunError
from mergebench.testing import check_method

PARENT = os.getpid()


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "FORK_FROM", 0)
    monkeypatch.setattr(executors, "joined", lambda: False)  # tests of clusters may have run here before


@pytest.mark.parametrize("name, parameters", [
    ("linear", {}), ("slerp", {"t": 0.4}), ("dare_ties", {"density": 0.3}), ("ties", {"density": 0.2}), ("pcb", {}),
])  # fmt: skip
def test_methods_keep_the_rules(name: str, parameters: dict[str, Any]) -> None:
    check_method(methods.get(name), **parameters)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = {f"layers.{number}": torch.randn(3, TILE) for number in range(6)} | {"steps": torch.arange(3 * TILE)}
    write_model(tmp_path / "base", base, shards=2)
    write_model(tmp_path / "ft1", fine_tuned(base, 1))
    write_model(tmp_path / "ft2", fine_tuned(base, 2))
    return tmp_path


def planned(folder: Path, method: Any, workers: int = 2) -> Plan:
    if isinstance(method, str):
        models = [{"model": str(folder / name)} for name in ("ft1", "ft2")]
        recipe = {"merge_method": method, "base_model": str(folder / "base"), "models": models}
        if method == "ties":
            recipe["parameters"] = {"density": 0.2}
        return mergebench.plan(mergebench.load(recipe), workers=workers)
    base, *models = (mergebench.deltas.open.open_model(str(folder / name)) for name in ("base", "ft1", "ft2"))
    merge = Merge(method, method.make_params({}), base, tuple(models), ("ft1", "ft2"), scope=method.scope)
    return plan_merge(merge, workers=workers)


def merged(folder: Path, method: Any, workers: int = 2, out: str = "out", **more: Any) -> Result:
    return run_plan(planned(folder, method, workers), folder / out, **more)


def same(one: Path, other: Path) -> bool:
    left, right = (
        load_file(one / "model-00001-of-00002.safetensors"),
        load_file(other / "model-00001-of-00002.safetensors"),
    )
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_processes_do_what_threads_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forked = merged(folder, "ties", workers=3, out="forked", progress=seen.append)
    assert not multiprocessing.active_children()
    monkeypatch.setattr(executors, "FORK_FROM", 1 << 60)
    assert isinstance(executors.start_workers(planned(folder, "ties"), executors.Files(), print), executors.Threads)
    threads = merged(folder, "ties", workers=3, out="threads")

    assert same(forked.out, threads.out)
    assert sum(seen) == forked.provenance["bytes_read"]
    assert forked.provenance["peak_memory"] > threads.provenance["peak_memory"]  # the children's own is in it
    differing = {"seconds", "stages", "peak_memory"}
    assert {key for key in forked.provenance if forked.provenance[key] != threads.provenance[key]} <= differing


def test_after_arithmetic_in_many_threads(folder: Path) -> None:
    """What torch's own threads leave behind in the parent does not hang a forked child."""
    large = torch.randn(700, 700)
    assert torch.isfinite(large @ large).all()
    assert merged(folder, "pcb").out.exists()
    done = threading.Thread(target=merged, args=(folder, "pcb"), kwargs={"out": "second"})  # nor another thread
    done.start()
    done.join()
    assert same(folder / "out", folder / "second")


def test_nan_is_named_by_a_child(folder: Path) -> None:
    tensors = load_file(folder / "ft2" / "model.safetensors")
    tensors["layers.4"][2, 7] = torch.nan
    write_model(folder / "ft2", tensors)
    for method in ("ties", "task_arithmetic"):
        with pytest.raises(RunError, match=r"^layers\.4: .*ft2 has nan at \[2, 7\]$") as caught:
            merged(folder, method)
        assert caught.value.hint is not None
        assert not (folder / "out").exists()
        assert not multiprocessing.active_children()


class Strange(Exception):
    """An error that cannot be sent: it wants two arguments and remembers one."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


@dataclass(frozen=True)
class Params:
    pass


def method_that(does: Callable[[], None]) -> Any:
    """A method that asks one question and then, in a child, `does` something."""

    @merge_method(takes="task_vectors", paper="none")
    def odd(tvs: TaskVectors, p: Params, ctx: Context) -> Any:
        """Do something odd."""
        (_,) = yield order_statistics(tvs, [1])
        if os.getpid() != PARENT:
            does()
        result: Tensor = tvs[0].clone()
        return result

    return odd


def fail(error: Exception) -> Callable[[], None]:
    def now() -> None:
        raise error

    return now


@pytest.mark.parametrize(
    "error, kind", [(ValueError("my fault"), ValueError), (Strange("my fault", "x"), RuntimeError)]
)
def test_a_fault_in_a_method_comes_with_its_place(folder: Path, error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="my fault") as caught:
        merged(folder, method_that(fail(error)))
    assert "in now" in "".join(caught.value.__notes__)
    assert not multiprocessing.active_children()


def test_a_method_may_refuse(folder: Path) -> None:
    with pytest.raises(MergebenchError, match="not this one"):
        merged(folder, method_that(fail(RunError("not this one", "take another"))))


def test_a_child_that_is_killed(folder: Path) -> None:
    """As by a machine that runs out of memory: one line, and --resume goes on."""
    with pytest.raises(RunError, match="worker process was killed") as caught:
        merged(folder, method_that(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert caught.value.hint is not None and "--resume" in caught.value.hint
    assert not multiprocessing.active_children()
    assert not (folder / "out").exists()
    assert merged(folder, method_that(lambda: None), resume=True).out.exists()


def test_what_a_child_inherits_does_not_keep_the_lock(folder: Path) -> None:
    """A run that failed may be followed by another at once, in the same process."""
    for _ in range(3):
        with pytest.raises(ValueError, match="my fault"):
            merged(folder, method_that(fail(ValueError("my fault"))))
    assert merged(folder, "linear", overwrite=True).out.exists()


def test_children_die_with_their_parent(folder: Path) -> None:
    """In the middle of a chunk: a run that goes on with --resume must not meet them."""

    def run() -> None:
        global PARENT
        PARENT = os.getpid()
        os.chdir(folder)
        torch.set_num_threads(1)  # the pool of threads stayed in the process that was forked
        merged(folder, method_that(lambda: time.sleep(60)))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    try:
        check_at_work(folder, 3)
        process.kill()
        process.join()
        check_at_work(folder, 0)
    finally:
        for number in at_work(folder):
            os.kill(number, signal.SIGKILL)
