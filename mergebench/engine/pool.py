"""Workers on the machines of a cluster, each with an object that is asked; any may die, and is replaced."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from mergebench.engine.cluster import Cluster, Machine, versions
from mergebench.engine.resident import Resident
from mergebench.errors import RunError, first_line

DEATHS = 3  # of workers, after which the piece of work they were at is given up
BEGUN = 2  # calls that a worker has answered, and is still at
KILLED = "its process was killed (is the machine out of memory?)"
AGAIN = "run it again, a merge or a search with --resume: what is done is kept"
PATIENCE = 20.0  # seconds without a worker until that is said
Shape = tuple[int, float, bool]  # the cores and GPUs of a worker, and whether it holds a model

log = logging.getLogger(__name__)


class Died(Exception):
    """All workers that tried some calls died at one of them."""

    calls: Sequence[Call] = ()


class Call:
    """What one worker is asked."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.deaths = 0  # of workers that were asked


class Worker:
    """A worker's process on some machine, as seen from here."""

    def __init__(self, handle: Any, machine: Machine, shape: Shape) -> None:
        self.handle, self.machine, self.shape = handle, machine, shape
        self.started = False
        self.calls: dict[Any, Call] = {}  # that it has not answered yet
        self.held: list[Call] = []  # whose results it keeps until it is asked for them
        self.looked: tuple[Call, Any] | None = None  # the call at which it was asked how it does, and the answer


_numbers = count(1)  # of pools
_idle: list[Worker] = []  # of pools that are closed: another one need not wait until they have started


@contextmanager
def _reaching() -> Iterator[None]:
    """`RunError` if the cluster is out of reach."""
    try:
        yield
    except sys.modules["ray"].exceptions.RayError:
        raise
    except (ConnectionError, RuntimeError) as error:
        log.info("%s", first_line(error))
        raise RunError("the cluster does not answer any more", AGAIN) from None


def _end(workers: Sequence[Worker]) -> None:
    """Kill the workers' processes."""
    for worker in workers:
        with suppress(Exception):
            sys.modules["ray"].kill(worker.handle)
        if worker in _idle:
            _idle.remove(worker)


class Pool:
    """Workers on the machines of a cluster, each with an object of its own, which `make()` makes there.

    What a worker that dies was asked is asked of another, and it is replaced where there is room.
    """

    def __init__(self, cluster: Cluster, make: Callable[[], Any], *, models: bool = False) -> None:
        import ray

        self._ray: Any = ray
        self._make = next(_numbers), [*self.sent(self._ray.cloudpickle.dumps(make)), str(Path.cwd()), sys.path]
        self._starting: dict[Any, Worker] = {}  # by the answer that says that it has started
        self._spare = self._most = DEATHS * sum(machine.workers for machine in cluster)  # deaths until it gives up
        self._again: deque[Call] = deque()  # what workers that died were asked
        self._said, self._died = time.monotonic(), ""
        self.workers: list[Worker] = []  # alive, started or not
        wanted: list[tuple[Machine, Shape]] = []
        for machine in cluster:
            each = (max(machine.cpus // machine.workers, 1), machine.gpus / machine.workers) if models else (1, 0.0)
            wanted += [(machine, (*each, models))] * machine.workers
        for machine, shape in list(wanted):
            there = (one for one in _idle if one.machine.node == machine.node and one.shape == shape)
            if (known := next(there, None)) is not None:
                _idle.remove(known)
                self.workers.append(known)
                wanted.remove((machine, shape))
        _end([one for one in _idle if wanted])  # they may hold the cores that are wanted
        for machine, shape in wanted:
            self._start(machine, shape)

    def _start(self, machine: Machine, shape: Shape) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        cpus, gpus, models = shape
        how: Any = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": 1 + models}
        there = NodeAffinitySchedulingStrategy(machine.node, soft=True)
        with _reaching():
            made = self._ray.remote(scheduling_strategy=there, **how)(Resident)
            worker = Worker(made.remote(), machine, shape)
            self._starting[worker.handle.versions.remote()] = worker
        self.workers.append(worker)

    def sent(self, value: Any) -> list[Any]:
        """What is sent in place of a value, to be read once in each process: in a list it stays a reference."""
        with _reaching():
            return [self._ray.put(value)]

    def _ask(self, worker: Worker, name: str, *arguments: Any) -> Any:
        with _reaching():
            return worker.handle.ask.remote(*self._make, name, *arguments)

    def _wait(self, answers: Sequence[Any], seconds: float) -> Sequence[Any]:
        """Those that have come, after at most so long without any."""
        with _reaching():
            come: Sequence[Any] = self._ray.wait(answers, timeout=seconds)[0]
        return come

    def _get(self, answer: Any) -> Any:
        with _reaching():
            return self._ray.get(answer)

    def each(
        self,
        name: str,
        take: Callable[[Worker], Call | None],
        depth: int = 1,
        watch: tuple[str, Callable[[Call, Any], None]] | None = None,
    ) -> Iterator[tuple[Worker, Call, Any]]:
        """Make all calls that `take` gives to the method `name` of the workers' objects; yields each with its answer,
        as it comes: `Died` where the workers died at it. Raises what the method raises.

        take: gives None if there is nothing more. depth: calls that a worker may have open. watch: another method, to
        be asked every second of workers at work, and what is told its answers.
        """
        while True:
            more = not any(worker.started for worker in self.workers)
            for worker in [one for one in self.workers if one.started]:
                while len(worker.calls) < depth:
                    call = self._again.popleft() if self._again else take(worker)
                    if call is None:
                        break
                    worker.calls[self._ask(worker, name, *call.arguments)] = call
                    more = True
            asked = {answer: worker for worker in self.workers for answer in worker.calls}
            if not asked and not more:
                return
            if watch is not None:
                self._look(*watch)
            for worker, answer in self._answered(asked):
                call = worker.calls.get(answer)
                if call is None:  # the worker died at another call
                    continue
                value = self._value(worker, answer)
                if isinstance(value, Died):
                    self._bury(worker, value)
                    for one in value.calls:
                        yield worker, one, value
                    continue
                del worker.calls[answer]
                self._spare = self._most
                yield worker, call, value

    def gathered(self, name: str, take: Callable[[Worker], Call | None], depth: int, end: str) -> Iterator[Any]:
        """Make calls whose results the workers keep; yields what each answers in the end, to the method `end`, or
        `Died` as `each`. What a worker that dies has kept is made again by others."""
        while True:
            for worker, call, value in self.each(name, take, depth):
                if isinstance(value, Died):
                    yield value
                else:
                    worker.held.append(call)
            holding = [worker for worker in self.workers if worker.held]
            if not holding:
                return
            for worker, value in self.every(end, holding):
                worker.held = []
                if not isinstance(value, Died) or value.calls:
                    yield value

    def _look(self, name: str, told: Callable[[Call, Any], None]) -> None:
        """Ask the workers at work how they do, and tell what they said when they were asked before."""
        for worker in self.workers:
            if worker.looked is None or worker.looked[0] not in worker.calls.values():
                worker.looked = None
            elif not self._wait([worker.looked[1]], 0):
                continue
            else:
                with suppress(self._ray.exceptions.RayError):  # it died; its call says so
                    worked, value = self._get(worker.looked[1])
                    if worked:
                        told(worker.looked[0], value)
            call = next(iter(worker.calls.values()), None)
            worker.looked = None if call is None else (call, self._ask(worker, name))

    def every(self, name: str, workers: Sequence[Worker] | None = None) -> Iterator[tuple[Worker, Any]]:
        """Ask workers once, by default all that have started; yields the answers, `Died` of those that do not live."""
        asked = [one for one in self.workers if one.started] if workers is None else workers
        open_ = {self._ask(one, name): one for one in asked}
        for answer, worker in open_.items():
            value = self._value(worker, answer)
            if isinstance(value, Died):
                self._bury(worker, value)
            yield worker, value

    def close(self, keep: bool = True) -> None:
        """Keep the workers for the next pool, but for those that are still at work; or none."""
        idle = [worker for worker in self.workers if keep and worker.started and not worker.calls]
        _end([worker for worker in self.workers if worker not in idle])
        _idle.extend(idle)
        self.workers = []

    def _answered(self, asked: dict[Any, Worker]) -> Iterator[tuple[Worker, Any]]:
        """The next answers, after at most a second; workers that have started meanwhile are admitted."""
        if not self.workers:
            what = f"the workers of the cluster die again and again: {self._died}"
            raise RunError(what, f"Ray's logs say more; {AGAIN}")
        for answer in self._wait([*asked, *self._starting], 1.0):
            if answer in self._starting:
                self._admit(self._starting.pop(answer), answer)
            else:
                yield asked[answer], answer
        if any(worker.started for worker in self.workers):
            self._said = time.monotonic()
        elif time.monotonic() - self._said > PATIENCE:
            self._said = float("inf")
            log.warning("no core of the cluster is free yet: %d workers wait", len(self.workers))

    def _admit(self, worker: Worker, answer: Any) -> None:
        """A worker that has started, or could not."""
        try:
            there = self._get(answer)
        except self._ray.exceptions.RayError as error:
            if "creation task" in str(error):  # it will do no better on a second try
                what = f"{worker.machine.name}: no worker starts: {_last_line(error)}"
                raise RunError(what, "install the same Python, Ray and mergebench on all machines") from None
            self._bury(worker, Died(_reason(error)))
            return
        for name, own in versions().items():
            if there[name] != own:
                what = f"{worker.machine.name} has {name} {there[name]}, this machine {own}"
                raise RunError(what, "install the same versions on all machines, or results may differ")
        worker.started = True

    def _value(self, worker: Worker, answer: Any) -> Any:
        """What the worker answered, or that it died; raises what was raised there."""
        try:
            worked, value = self._get(answer)
        except self._ray.exceptions.RayTaskError as error:
            raise RunError(f"{worker.machine.name}: {_last_line(error)}") from None
        except self._ray.exceptions.RayError as error:
            return Died(_reason(error))
        if not worked:
            raise value
        return value

    def _bury(self, worker: Worker, died: Died) -> None:
        """Replace a worker; the calls whose results are lost are made again. It died at one of the last; `died` gets
        those at which too many died."""
        self.workers.remove(worker)
        _end([worker])  # it may not be dead, but out of reach
        if self._spare:
            self._spare -= 1
            self._start(worker.machine, worker.shape)
        self._died = str(died)
        if worker.started:
            log.warning("a worker on %s died, its work is done again: %s", worker.machine.name, died)
        lost = [*worker.held, *worker.calls.values()]
        for call in lost[max(len(worker.held) - BEGUN, 0) :]:
            call.deaths += 1
        died.calls = [call for call in lost if call.deaths >= DEATHS]
        self._again += [call for call in lost if call not in died.calls]
        worker.calls = {}


def _reason(error: Exception) -> str:
    """Why a worker died, in Ray's words made short."""
    said = str(error)
    if "never ran" in said:
        return "it did not start (RAY_AUTH_MODE must be that of the cluster)"
    if isinstance(error, sys.modules["ray"].exceptions.OutOfMemoryError) or "memory usage threshold" in said:
        return "its machine ran low on memory"
    if "node" in said.lower() and ("died" in said or "terminated" in said) and "worker process has died" not in said:
        return "its machine is gone"
    return KILLED


def _last_line(error: Exception) -> str:
    """What was raised where a worker was made, without the trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
