"""Joining a cluster, and how its workers are counted. (The first file: later tests kill machines.)"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mergebench.engine import cluster as clusters
from mergebench.engine.pool import Call, Pool
from mergebench.errors import RecipeError, RunError

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(("on", "workers", "message"), [
    ("spark", None, "--on spark: not an executor"),
    ("ray://127.0.0.1", None, "--on ray://127.0.0.1: not an executor"),
    ("ray", 6, "--workers 6: the cluster has 5 cores"),
])  # fmt: skip
def test_what_cannot_be_joined(on: str, workers: int | None, message: str, cluster: Any) -> None:
    with pytest.raises(RecipeError, match=message):
        clusters.join(on, workers)


def test_workers_are_spread_by_cores(cluster: Any) -> None:
    def shares(workers: int | None, models: bool = False) -> list[int]:
        return sorted(machine.workers for machine in clusters.join("ray", workers, models=models))

    assert [shares(count) for count in (1, 2, 3, 5, None)] == [[1], [1, 1], [1, 1, 1], [1, 2, 2], [1, 2, 2]]
    assert shares(None, models=True) == [1, 1, 1]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_nothing_listens_there(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "PATIENCE", 0.1)
    with pytest.raises(ConnectionRefusedError):
        clusters._await(address)


def test_joining_can_be_ended(tmp_path: Path) -> None:
    """Where something listens that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        on = f"ray://127.0.0.1:{silent.getsockname()[1]}"
        joins = f"from mergebench.engine.cluster import join; join({on!r})"
        with subprocess.Popen([sys.executable, "-c", joins], stderr=subprocess.PIPE, cwd=tmp_path) as joining:
            silent.accept()[0].close()  # the first look; then Ray's own client comes
            with silent.accept()[0]:
                joining.terminate()
                assert joining.wait(timeout=60) == -signal.SIGTERM


class Elsewhere:
    """What can be sent, and not be received: it names a file that the worker's machine lacks."""

    def __reduce__(self) -> Any:
        return open, ("nowhere/mine.py",)

    def __call__(self) -> None: ...


def test_what_a_worker_lacks(cluster: Any) -> None:
    pool = Pool(clusters.join("ray", 1), Elsewhere())
    with pytest.raises(RunError, match=r"^\S+: nowhere/mine.py: No such file or directory$") as raised:
        next(pool.each("any", lambda worker: Call()))
    assert raised.value.hint == clusters.SHARE
    pool.close()


def test_a_cluster_that_is_lost(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the client of one says it; a lost head is missed for half a minute first."""
    import ray

    def lost(*_: Any, **__: Any) -> None:
        raise ConnectionError("Request can't be sent")

    pool = Pool(clusters.join("ray", 1), str)
    with monkeypatch.context() as patch, pytest.raises(RunError, match="the cluster does not answer any more"):
        patch.setattr(ray, "wait", lost)
        next(pool.each("any", lambda worker: Call()))
    pool.close()


def test_a_worker_that_nobody_asks_any_more_can_end() -> None:
    """As when the command was killed: its process must not wait for batches for ever."""
    waits = "import queue; from mergebench.engine import on_ray; on_ray._thread.submit(queue.Queue().get)"
    subprocess.run([sys.executable, "-c", waits], timeout=60, check=True)


def test_a_larger_machine_gets_more_workers() -> None:
    machines = [clusters.Machine("a", "a", 2, 0), clusters.Machine("b", "b", 6, 0)]
    assert [machine.workers for machine in clusters._spread(machines, 4, models=False)] == [1, 3]
