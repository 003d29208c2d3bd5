"""The executor for clusters: workers on all machines, which read and write the storage that these share."""

from __future__ import annotations

import platform
import queue
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mergebench.checkpoint.files import Files
from mergebench.engine import pool
from mergebench.engine.batches import BATCH, Batches, Progress, advise
from mergebench.engine.cluster import SHARE, Marker, marked
from mergebench.engine.items import Item
from mergebench.engine.plan import Plan
from mergebench.engine.pool import Call, Died, Pool
from mergebench.engine.worker import Worker
from mergebench.errors import RunError

AHEAD = 2  # batches that a worker has got beside the one it is at
BATCHES = 24  # of a sweep for each worker, so that all end at about the same time
LARGEST = 64  # chunks of a batch: handing one out takes half a millisecond


@dataclass
class _Batch:
    """Chunks that are handed out together."""

    items: Sequence[Item]
    deaths: int = 0  # of workers that were at it


def _gives_up(batches: Sequence[_Batch], died: Died) -> RunError:
    names = ", ".join(dict.fromkeys(span.tensor for one in batches for item in one.items for span in item.spans))
    return RunError(f"{names}: each worker there dies: {died}", "use fewer --workers, and continue with --resume")


class OnRay:
    """The workers of a run on a cluster. What one has gathered is fetched when the task ends; if it dies before, all
    that it did for the task is done again by others."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        import ray

        self._ray, self._plan, self._progress = ray, plan, progress
        self._marker: Marker | None = None
        self._pool = Pool(plan.cluster, partial(Hand, plan))
        self._tasks = 0
        self._at_work = False
        count = sum(machine.workers for machine in plan.cluster)
        self._size = min(max(plan.elements // plan.chunk // (count * BATCHES), BATCH), LARGEST)

    @contextmanager
    def writing(self, directory: Path) -> Iterator[None]:
        """Each worker must find a marker there before its first chunk, and before it writes a batch: the workers of a
        run that was killed stop, because the next run begins with removing the marker."""
        with marked(directory) as self._marker:
            yield

    def run(self, task: str, items: Iterator[Item], *arguments: Any) -> Iterator[Any]:
        """The results as they come: each is as large as the statistics of the task."""
        batches = Batches(self._plan, None, items, task, self._progress, self._size)
        shared = [self._ray.put(arguments)]
        lost: deque[_Batch] = deque()

        def take(worker: pool.Worker) -> Call | None:
            batch = lost.popleft() if lost else _Batch(batches.take())
            return Call(self._tasks, task, shared, batch, self._marker) if batch.items else None

        self._at_work = True
        while True:
            self._tasks += 1
            given = defaultdict[pool.Worker, list[_Batch]](list)
            for worker, call, answer in self._pool.each("step", take, AHEAD):
                if isinstance(answer, Died):
                    raise _gives_up([call.arguments[3]], answer)
                given[worker].append(call.arguments[3])
            for worker, result in self._pool.every("end", self._tasks):
                if given.pop(worker, None):
                    yield result
            suspects = [batch for of_one in given.values() for batch in of_one[-AHEAD - 1 :]]  # who died, died at one
            for batch in suspects:
                batch.deaths += 1
            if any(batch.deaths == pool.DEATHS for batch in suspects):
                raise _gives_up([one for one in suspects if one.deaths == pool.DEATHS], Died(pool.KILLED))
            lost.extend(batch for of_one in given.values() for batch in of_one)
            if not lost:
                self._at_work = False
                return

    def memory(self) -> int:
        return sum(peak for _, peak in self._pool.every("close"))

    def close(self) -> None:
        self._pool.close(keep=not self._at_work)  # a task that broke off has left threads that wait for batches


# One thread for all that a process merges: glibc has a heap for each thread, and every new one's would stay.
_thread = ThreadPoolExecutor(1, "merging", initializer=torch.set_num_threads, initargs=(1,))


class Hand:
    """In the process of a worker: the engine's `Worker` in a thread, which is fed with batches."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._files = plan, Files()
        self._worker = Worker(plan, self._files)
        self._task = 0
        self._batches: queue.Queue[Sequence[Item]] = queue.Queue(1)
        self._result: Future[Any] | None = None  # of the task at hand

    def step(self, number: int, task: str, shared: list[Any], batch: _Batch, marker: Marker | None) -> None:
        """Take a batch of the task of that number; waits until the one before it was begun. Raises what failed."""
        if marker is not None:
            marker.check()
        if number != self._task:
            self._begin(number, task, shared)
        if task != "sample":
            advise(self._plan, self._files, batch.items)
        self._put(batch.items)

    def end(self, number: int) -> Any:
        """The result of the task's batches; None if there were none."""
        if number != self._task or self._result is None:
            return None
        self._put(())
        result, self._result = self._result.result(), None
        return result

    def close(self) -> int:
        """Peak bytes of this process; `RunError` if an input has changed."""
        self._files.check()
        self._worker.close()
        return self._worker.peak_memory(())

    def _begin(self, number: int, task: str, shared: list[Any]) -> None:
        import ray

        if not self._task:
            self._check_inputs()
        self._task = number
        self._result = _thread.submit(self._work, task, ray.get(shared[0]))

    def _work(self, task: str, arguments: Sequence[Any]) -> Any:
        with torch.inference_mode():
            result = getattr(self._worker, task)(self._stream(), *arguments)
        self._worker.note_memory()
        return result

    def _stream(self) -> Iterator[Item]:
        while batch := self._batches.get():
            yield from batch

    def _put(self, batch: Sequence[Item]) -> None:
        """Hand a batch to the thread; raises what failed there."""
        assert self._result is not None
        while not self._result.done():
            with suppress(queue.Full):
                self._batches.put(batch, timeout=0.1)
                return
        self._result.result()

    def _check_inputs(self) -> None:
        """Whether this machine sees the files that the plan was made from."""
        for model in [self._plan.merge.reference, *self._plan.merge.models]:
            for header in model.headers:
                try:
                    header.check()
                except RunError as error:
                    raise RunError(f"{platform.node()}: {error.message}", SHARE) from None
