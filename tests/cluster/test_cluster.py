"""Joining a cluster, and how its workers are counted. (The first file: later tests kill machines.)"""

from __future__ import annotations

from typing import Any

import pytest

from mergebench.engine import cluster as clusters
from mergebench.errors import RecipeError

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(("on", "workers", "message"), [
    ("spark", None, "--on spark: not an executor"),
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
