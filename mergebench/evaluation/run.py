"""Measuring candidates on a suite: in this process, or side by side on a cluster."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mergebench.errors import RecipeError
from mergebench.evaluation.batch import Batch, Candidate, Meter, Outcome, Step
from mergebench.evaluation.results import Results, with_relatives
from mergebench.evaluation.seen import seen
from mergebench.evaluation.suite import Suite

if TYPE_CHECKING:
    from mergebench.engine.cluster import Cluster
    from mergebench.evaluation.store import Store


def evaluate_models(
    candidates: Sequence[Candidate],
    suite: Suite,
    *,
    device: str = "auto",
    store: Store | None = None,
    progress: Callable[[Step], None] | None = None,
    cluster: Cluster = (),
) -> Results:
    """Measure every candidate on every task, in the given order, in float32.

    `device`: auto (CUDA where there is one), cpu or cuda. On one device the predictions depend on the models and the
    suite alone, not on the number of cores. Results in the store are reused, and new results kept there. A model that
    fails is listed in `made["failed"]`, and the others are still measured; if nothing at all can be measured, the first
    error is raised. cluster: machines whose workers measure models and tasks side by side.
    """
    from mergebench.networks.device import device_of, versions

    twice = [name for name, count in Counter(candidate.name for candidate in candidates).items() if count > 1]
    if twice:
        raise RecipeError(f"two models to measure are called '{twice[0]}'", "name each model once")
    suite = suite.only()
    start, date = time.perf_counter(), datetime.now(UTC)
    meter = Meter(progress, len(candidates) * suite.items)
    if cluster:
        from mergebench.evaluation.on_ray import measure_all

        found, used = measure_all(candidates, suite, device, store, meter, cluster)
    else:
        batch, found, used = Batch(suite, device, store, meter), Outcome(), str(device_of(device))
        for candidate in candidates:
            found.add(batch.measure(candidate))
    if not found.records and found.errors:
        raise found.errors[0]
    made = {**versions(), "suite": suite.to_dict(), "device": used}
    made |= {"date": date.isoformat(timespec="seconds"), "known": found.known}
    made |= {"by_task": found.by_task} if found.by_task else {}
    made |= {"bytes": found.sizes} if found.sizes else {}
    made |= {"failed": found.failed} if found.failed else {}
    made |= {"notes": found.notes} if found.notes else {}
    known_texts = seen(candidates, suite)
    made |= {"seen": known_texts} if known_texts else {}
    made["seconds"] = round(time.perf_counter() - start, 3)
    items = {task.name: task.ready.asked for task in suite.tasks if task.ready.asked}
    return Results(made, with_relatives(found.records, homes_of(candidates, suite)), items)


def homes_of(candidates: Sequence[Candidate], suite: Suite) -> dict[str, str]:
    """Each task's own fine-tune: the input model whose directory holds the task's head."""
    owners: dict[Path, str] = {}
    for candidate in candidates:
        if candidate.role == "input" and candidate.directory is not None:
            owners.setdefault(candidate.directory.resolve(), candidate.name)
    homes = {task.name: task.ready.home.resolve() for task in suite.tasks if task.ready.home is not None}
    return {task: owners[home] for task, home in homes.items() if home in owners}
