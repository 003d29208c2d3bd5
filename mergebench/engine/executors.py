"""Executors: hand out chunks in file order, in batches, to processes, threads or machines.

Python runs one thread at a time, so threads wait for one another between arithmetic calls. On two cores the second
thread adds a third of the speed; on sixteen, most threads would idle. So a large merge on a CPU runs in forked
processes, which share only the plan. Threads run small merges, merges on a GPU (where the arithmetic is elsewhere), and
merges on systems without fork. On a cluster, `on_ray` does the same.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import torch

from mergebench.checkpoint.files import Files
from mergebench.engine.batches import Batches, Executor, Progress
from mergebench.engine.cluster import joined
from mergebench.engine.inmemory import InMemory
from mergebench.engine.items import Item
from mergebench.engine.plan import Plan
from mergebench.engine.worker import Worker
from mergebench.errors import RunError, sendable

FORK_FROM = 200_000_000  # bytes to read above which processes are worth starting
_PARENT_DEATH_SIGNAL = 1  # prctl(2): PR_SET_PDEATHSIG


def start_workers(plan: Plan, files: Files, progress: Progress, target: InMemory | None = None) -> Executor:
    """The workers of one run."""
    if plan.cluster:
        from mergebench.engine.on_ray import OnRay  # an extra

        return OnRay(plan, progress)
    can_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon and not joined()
    if can_fork and plan.device.type == "cpu" and plan.workers > 1 and plan.bytes_read >= FORK_FROM:
        return Processes(plan, files, progress, target)
    return Threads(plan, files, progress, target)


class Threads:
    """Workers in threads of this process."""

    def __init__(self, plan: Plan, files: Files, progress: Progress, target: InMemory | None) -> None:
        self._plan, self._files, self._progress = plan, files, progress
        self._workers = [Worker(plan, files, target) for _ in range(plan.workers)]
        self._pool = ThreadPoolExecutor(plan.workers, "worker", initializer=torch.set_num_threads, initargs=(1,))
        self._stop = threading.Event()
        self._threads = torch.get_num_threads()

    def run(self, task: str, items: Iterator[Item], *arguments: Any) -> list[Any]:
        """Run `task` on batches of all items on all workers; returns their results."""
        batches = Batches(self._plan, self._files, items, task, self._progress)

        def stream() -> Iterator[Item]:
            while batch := batches.take():
                for item in batch:
                    if self._stop.is_set():
                        return
                    yield item

        def work(worker: Worker) -> Any:
            on_gpu = self._plan.device.type == "cuda"  # a stream of its own: workers copy and compute side by side
            cuda = torch.cuda.stream(torch.cuda.Stream(self._plan.device)) if on_gpu else nullcontext()  # type: ignore[no-untyped-call]
            try:
                with torch.inference_mode(), cuda:
                    return getattr(worker, task)(stream(), *arguments)
            except BaseException:
                self._stop.set()
                raise

        futures = [self._pool.submit(work, worker) for worker in self._workers]
        try:
            return [future.result() for future in futures]
        except BaseException:
            self._stop.set()
            for future in futures:
                future.exception()
            raise

    def writing(self, directory: Path) -> AbstractContextManager[None]:
        return nullcontext()

    def memory(self) -> int:
        return 0

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True)
        for worker in self._workers:
            worker.close()
        torch.set_num_threads(self._threads)


class Processes:
    """Workers in forked processes. They ask for batches; this process hands them out and collects results."""

    def __init__(self, plan: Plan, files: Files, progress: Progress, target: InMemory | None) -> None:
        self._plan, self._files, self._progress = plan, files, progress
        self._connections: list[Connection] = []
        self._processes = []
        context = multiprocessing.get_context("fork")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # only this process handles Ctrl-C
        try:
            for _ in range(plan.workers):
                mine, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(plan, files, target, theirs, os.getpid()), daemon=True)
                process.start()
                theirs.close()
                self._connections.append(mine)
                self._processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self, task: str, items: Iterator[Item], *arguments: Any) -> list[Any]:
        """Run `task` on batches of all items on all workers; returns their results."""
        order = pickle.dumps((task, arguments))
        for connection in self._connections:
            connection.send_bytes(order)
        batches = Batches(self._plan, self._files, items, task, self._progress)
        results: dict[Any, Any] = {}
        while len(results) < len(self._connections):
            for connection in cast("list[Connection]", wait([one for one in self._connections if one not in results])):
                try:
                    kind, value = _receive(connection)
                    if kind == "next":
                        connection.send_bytes(pickle.dumps(batches.take()))
                    elif kind == "done":
                        results[connection] = value
                    else:
                        raise value
                except (EOFError, ConnectionError):
                    raise RunError(
                        "a worker process was killed (is the machine out of memory?)",
                        "use fewer --workers, and continue with --resume",
                    ) from None
        return [results[connection] for connection in self._connections]

    def writing(self, directory: Path) -> AbstractContextManager[None]:
        return nullcontext()

    def memory(self) -> int:
        """Without what they share with this process."""
        return sum(self.run("peak_memory", iter(())))

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def _serve(plan: Plan, files: Files, target: InMemory | None, connection: Connection, parent: int) -> None:
    """The loop of a forked worker: tasks in, results out, until the parent ends it or dies."""
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)  # it must not write after the lock is released
    for number in (signal.SIGTERM, signal.SIGHUP):
        if callable(signal.getsignal(number)):  # the parent's, which ends its own contexts
            signal.signal(number, signal.SIG_DFL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how the parent ends it, whatever it computes
    torch.set_num_threads(1)
    worker: Worker | None = None

    def stream() -> Iterator[Item]:
        _send(connection, ("next", None))
        while batch := pickle.loads(connection.recv_bytes()):
            _send(connection, ("next", None))  # for the batch after this one
            yield from batch

    with suppress(EOFError, ConnectionError), torch.inference_mode():
        while True:
            task, arguments = pickle.loads(connection.recv_bytes())
            try:
                worker = worker or Worker(plan, files, target)
                answer = getattr(worker, task)(stream(), *arguments)
                worker.note_memory()
            except (EOFError, ConnectionError):
                raise
            except Exception as error:
                _send(connection, ("failed", sendable(error)))
                while True:  # a batch may be on its way; then the parent ends all workers
                    connection.recv_bytes()
            _send(connection, ("done", answer))
            del answer  # free its memory for the next task
    os._exit(0)  # skip the parent's exit handlers


def _send(connection: Connection, value: Any) -> None:
    """Send a value to the parent; arrays are sent without a copy."""
    arrays: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    connection.send_bytes(len(arrays).to_bytes(8, "little") + rest)
    for array in arrays:
        connection.send_bytes(array.raw())


def _receive(connection: Connection) -> Any:
    """Receive a value; its arrays stay in the received memory and are read-only."""
    rest = connection.recv_bytes()
    arrays = [connection.recv_bytes() for _ in range(int.from_bytes(rest[:8], "little"))]
    return pickle.loads(rest[8:], buffers=arrays)
