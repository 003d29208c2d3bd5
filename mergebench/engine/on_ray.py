"""The executor for clusters: workers on all machines, which read and write the storage that these share."""

from __future__ import annotations

import pickle
import platform
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
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


def _gives_up(died: Died) -> RunError:
    items = (item for call in died.calls for item in pickle.loads(call.arguments[2]))
    tensors = list(dict.fromkeys(span.tensor for item in items for span in item.spans))
    names = ", ".join([*tensors[:3], *([f"{len(tensors) - 3} more"] if len(tensors) > 3 else [])])
    return RunError(f"{names}: each worker there dies: {died}", "use fewer --workers, and continue with --resume")


class OnRay:
    """The workers of a run on a cluster. What one has gathered is fetched when the task ends."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._plan, self._progress = plan, progress
        self._marker: Marker | None = None
        self._pool = Pool(plan.cluster, partial(Hand, plan))
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
        shared = self._pool.sent(arguments)

        def take(_: pool.Worker) -> Call | None:
            batch = batches.take()  # pickled here: Ray's own pickler asks Python about each item
            return Call(task, shared, pickle.dumps(batch), self._marker) if batch else None

        self._at_work = True
        for answer in self._pool.gathered("step", take, AHEAD, "end"):
            if isinstance(answer, Died):
                raise _gives_up(answer)
            yield answer
        self._at_work = False

    def memory(self) -> int:
        return sum(peak for _, peak in self._pool.every("close") if not isinstance(peak, Died))

    def close(self) -> None:
        self._pool.close(keep=not self._at_work)  # a task that broke off has left threads that wait for batches


class Thread(threading.Thread):
    """Does one thing after another. The process may end while it waits for batches that nobody sends any more, which
    that of an executor would not allow."""

    def __init__(self) -> None:
        super().__init__(name="merging", daemon=True)
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        if not self.is_alive():
            self.start()
        result: Future[Any] = Future()
        self._work.put((result, work))
        return result

    def run(self) -> None:
        torch.set_num_threads(1)
        while True:
            result, work = self._work.get()
            try:
                result.set_result(work())
            except BaseException as error:
                result.set_exception(error)
            del result, work  # free their memory for the next one


_thread = Thread()  # for all that a process merges: glibc has a heap for each thread, and every new one's would stay


class Hand:
    """In the process of a worker: the engine's `Worker` in a thread, which is fed with batches."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._files = plan, Files()
        self._worker = Worker(plan, self._files)
        self._batches: queue.Queue[Sequence[Item]] = queue.Queue(1)
        self._result: Future[Any] | None = None  # of the task at hand

    def step(self, task: str, shared: list[Any], sent: bytes, marker: Marker | None) -> None:
        """Take a batch of a task; waits until the one before it was begun. Raises what failed."""
        if marker is not None:
            marker.check()
        if self._result is None:
            self._check_inputs()
            self._result = _thread.submit(partial(self._work, task, sys.modules["ray"].get(shared[0])))
        batch = pickle.loads(sent)
        if task != "sample":
            advise(self._plan, self._files, batch)
        self._put(batch)

    def end(self) -> Any:
        """The result of the task's batches."""
        assert self._result is not None
        self._put(())
        result, self._result = self._result.result(), None
        return result

    def close(self) -> int:
        """Peak bytes of this process; `RunError` if an input has changed."""
        self._files.check()
        self._worker.close()
        return self._worker.peak_memory(())

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
