"""A cluster of three simulated machines on this one: 1, 2 and 2 cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mergebench.engine.cluster import join, leave
from tests.evaluation.search.conftest import made, place  # noqa: F401  (fixtures)


def kept(folder: str) -> dict[str, int]:
    """The results in a folder: a file for each model and task, and which one it is."""
    return {path.name: path.stat().st_ino for path in Path(folder).glob("?" * 40 + ".json")}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Ray's cluster; this process is a part of it."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        from ray.cluster_utils import Cluster

        small = {"object_store_memory": 100 << 20}
        soon = {"health_check_period_ms": 1000, "health_check_timeout_ms": 1000}  # a dead machine is found in 5 s
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": soon, **small},
        )
        for _ in range(2):
            made.add_node(num_cpus=2, **small)
        made.wait_for_nodes()
        patch.setenv("RAY_ADDRESS", made.address)
        join("ray")
        yield made
        leave()
        made.shutdown()


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lose(cluster: Any) -> Iterator[Callable[[], None]]:
    """A function that kills a machine of two cores; another one takes its place after the test."""
    lost = []

    def one() -> None:
        node = next(node for node in cluster.worker_nodes if node not in lost)
        lost.append(node)
        cluster.remove_node(node, allow_graceful=False)

    yield one
    for _ in lost:
        cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
