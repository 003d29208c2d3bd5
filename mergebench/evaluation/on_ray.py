"""Measuring on a cluster: each worker holds one model at a time, and is given a model and a task."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from mergebench.checkpoint.content import may_keep
from mergebench.engine.cluster import Cluster, Marker, marked
from mergebench.engine.pool import Call, Died, Pool, Worker
from mergebench.errors import RunError
from mergebench.evaluation.batch import Batch, Candidate, Meter, Outcome
from mergebench.evaluation.suite import Suite

if TYPE_CHECKING:
    from mergebench.evaluation.store import Store


def measure_all(
    candidates: Sequence[Candidate], suite: Suite, device: str, store: Store | None, meter: Meter, cluster: Cluster
) -> tuple[Outcome, str]:
    """What every candidate gives on every task, in their order, and the device that measured.

    A worker goes on with the model that it holds; when its tasks are given away, it begins with another, and at last
    shares one. A model that kills its workers is a failed one.
    """
    names = tuple(task.name for task in suite.tasks)
    parts: dict[tuple[int, tuple[str, ...]], Outcome] = {}
    for number, candidate in enumerate(candidates):
        together = [names] if callable(candidate.model) else [(name,) for name in names]  # it is opened, or made, once
        parts |= {(number, tasks): Outcome() for tasks in together}
    open_, holds, used = list(parts), dict[Worker, int](), set[str]()

    def take(worker: Worker) -> Call | None:
        held = [number for one, number in holds.items() if one is not worker and one in pool.workers]
        unit = min(open_, key=lambda unit: (unit[0] != holds.get(worker), unit[0] in held), default=None)
        if unit is None:
            return None
        open_.remove(unit)
        holds[worker] = unit[0]
        return Call(*unit)

    def watch(call: Call, counts: dict[tuple[str, str], int]) -> None:
        for (model, task), items in counts.items():
            meter.reach(model, task, items)

    with (
        marked(store.folder) if store is not None and may_keep(store.folder) else nullcontext() as marker,
        closing(Pool(cluster, partial(Evaluator, list(candidates), suite, device, store, marker), models=True)) as pool,
    ):
        for _, call, answer in pool.each("measure", take, watch=("progress", watch)):
            number, tasks = call.arguments
            part = parts[number, tasks]
            if isinstance(answer, Died):
                name = candidates[number].name
                what = f"model '{name}': the workers that measure it die: {answer}"
                part.fail(name, tasks, RunError(what, "measure it on machines with more memory, or fewer --workers"))
            else:
                found, device_used = answer
                used.add(device_used)
                part.add(found)
            for task in (task for task in suite.tasks if task.name in tasks):
                meter.reach(candidates[number].name, task.name, task.ready.n, part.known == len(tasks))
    whole = Outcome()
    for part in parts.values():
        whole.add(part)
    return whole, ", ".join(sorted(used)) or device


class Evaluator:
    """In the process of a worker: a `Batch`, and the candidates by number."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        suite: Suite,
        device: str,
        store: Store | None,
        marker: Marker | None,
    ) -> None:
        if marker is not None:  # else each machine would keep results of its own
            marker.check()
        self._candidates, self._meter = candidates, Meter(None, 0)
        self._batch = Batch(suite, device, store, self._meter)

    def measure(self, number: int, tasks: tuple[str, ...]) -> tuple[Outcome, str]:
        """What a candidate gives on some tasks, and the device."""
        self._meter.counts.clear()
        return self._batch.measure(self._candidates[number], tasks), str(self._batch.device)

    def progress(self) -> dict[tuple[str, str], int]:
        """How many items of the model and tasks at hand are done."""
        return dict(self._meter.counts)
