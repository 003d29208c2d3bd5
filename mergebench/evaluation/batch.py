"""One process at work: models on the tasks of a suite, one in memory at a time."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench.errors import MergebenchError, RunError, in_words, out_of_memory
from mergebench.evaluation.results import Record, Role
from mergebench.evaluation.size import bytes_of
from mergebench.evaluation.suite import Suite, Task

if TYPE_CHECKING:
    from mergebench.evaluation.store import Store
    from mergebench.evaluation.task import Score
    from mergebench.networks.loadable import LoadableModel
    from mergebench.networks.network import Network

    Measured = LoadableModel | Mapping[str, LoadableModel]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A model to measure, or a model for each task by name. A function opens the model when its turn comes.

    directory: the model's own; it is the fine-tune of any task whose head lies there. key: the key of its results, for
    a model that is not made of files.
    """

    name: str
    role: Role
    model: Measured | Callable[[], Measured]
    directory: Path | None = None
    key: str | None = None


@dataclass(frozen=True)
class Step:
    """The progress of an evaluation, in items of all models and tasks."""

    model: str
    task: str
    done: int
    total: int
    known: bool = False  # the result was in the store


@dataclass
class Outcome:
    """What measuring some models on some tasks gave."""

    records: list[Record] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    errors: list[MergebenchError] = field(default_factory=list)
    by_task: list[str] = field(default_factory=list)  # candidates with a model for each task
    sizes: dict[str, int] = field(default_factory=dict)  # of candidates on disk, in bytes
    notes: list[str] = field(default_factory=list)  # about how models were read
    known: int = 0  # results that were in the store

    def fail(self, candidate: str, tasks: Sequence[str], error: MergebenchError) -> None:
        self.errors.append(error)
        self.failed.append({"model": candidate, "tasks": list(tasks), "error": error.message, "hint": error.hint})

    def add(self, other: Outcome) -> None:
        """Add another part; of what both say, once."""
        self.records += other.records
        self.failed += other.failed
        self.errors += other.errors
        self.by_task += [one for one in other.by_task if one not in self.by_task]
        self.sizes |= other.sizes
        self.notes += [one for one in other.notes if one not in self.notes]
        self.known += other.known


class Batch:
    """Measures models on the tasks of one suite, one after another, with one in memory at a time."""

    def __init__(self, suite: Suite, device: str, store: Store | None, meter: Meter | None = None) -> None:
        from mergebench.networks.device import device_of, versions

        self.suite, self.device, self.store = suite, device_of(device), store
        self.meter = meter or Meter(None, 0)
        self._versions = versions()
        self._part = Outcome()
        self._network: Network | None = None
        self._held: LoadableModel | None = None  # the model whose weights the network has

    def measure(self, candidate: Candidate, names: Sequence[str] | None = None) -> Outcome:
        """One candidate's records in the order of the suite; tasks of one network class share a model in memory.

        names: of the tasks, if not all.
        """
        self._part = part = Outcome()
        every = [task for task in self.suite.tasks if names is None or task.name in names]
        with self._failing(candidate, every):
            model = candidate.model() if callable(candidate.model) else candidate.model
            part.by_task += [candidate.name] if isinstance(model, Mapping) else []
            size = bytes_of(model)
            part.sizes |= {} if size is None else {candidate.name: size}
            each = model if isinstance(model, Mapping) else {task.name: model for task in every}
            sharing: dict[tuple[str, int], list[Task]] = {}
            for task in every:
                sharing.setdefault((task.kind.network, id(each[task.name])), []).append(task)
            found: dict[str, Record] = {}
            for tasks in sharing.values():
                found |= self._measure(candidate, each[tasks[0].name], tasks)
            part.records += [found[task.name] for task in every if task.name in found]
        return part

    def _measure(self, candidate: Candidate, model: LoadableModel, tasks: Sequence[Task]) -> dict[str, Record]:
        """The records of tasks that share a model; results missing from the store are measured."""
        found: dict[str, Record] = {}
        open_: list[tuple[Task, str | None]] = []
        for task in tasks:
            key = self._key(candidate, model, task)
            kept = None if self.store is None else self.store.find(key)
            if kept is None:
                open_.append((task, key))
            else:
                self._part.known += 1
                log.info("%s on %s: measured before", candidate.name, task.name)
                self.meter.of(candidate.name, task.name, known=True)(task.ready.n)
                found[task.name] = _record(candidate, task, *kept)
        with self._failing(candidate, [task for task, _ in open_]):
            if open_:
                self._hold(model, tasks[0].kind.network)  # a model that cannot be built fails once, for all tasks
            for task, key in open_:
                with self._failing(candidate, [task]):
                    network = self._hold(model, task.kind.network)  # again, if memory ran out
                    start = time.perf_counter()
                    score = task.ready.measure(network, self.meter.of(candidate.name, task.name))
                    seconds = round(time.perf_counter() - start, 3)
                    notes = (f"{candidate.name}: {remark}" for remark in network.remarks)
                    self._part.notes += [note for note in notes if note not in self._part.notes]
                    if self.store is not None:
                        self.store.keep(key, score, seconds, self._origin(candidate, task))
                    log.info("%s on %s: measured in %.1f s", candidate.name, task.name, seconds)
                    found[task.name] = _record(candidate, task, score, seconds)
        return found

    def is_known(self, candidate: Candidate, task: Task) -> bool:
        """Whether the store has a model's result; False for one that cannot be opened."""
        try:
            model = candidate.model() if callable(candidate.model) else candidate.model
            one = model[task.name] if isinstance(model, Mapping) else model
            return self.store is not None and self.store.find(self._key(candidate, one, task)) is not None
        except MergebenchError:
            return False

    def _key(self, candidate: Candidate, model: LoadableModel, task: Task) -> str | None:
        if self.store is None:
            return None
        content = candidate.key or self.store.content(model)
        return self.store.key(content, task, self.device.type, self._versions)

    def _origin(self, candidate: Candidate, task: Task) -> dict[str, Any]:
        """Where a result is from, by absolute paths."""
        files = [*task.ready.files, *([candidate.directory] if candidate.directory is not None else [])]
        suite = None if self.suite.path is None else str(self.suite.path.absolute())
        listed = [str(file.absolute()) for file in files]
        return {"model": candidate.name, "task": task.name, "suite": suite, "files": listed}

    def _hold(self, model: LoadableModel, auto_class: str) -> Network:
        """The model in memory, in the place of the one before it."""
        from mergebench.networks.network import Network

        alike = self._network is not None and self._network.auto_class == auto_class
        if self._held is model and self._network is not None and alike:
            return self._network
        network, self._network = self._network, None
        if network is None or not alike or not network.take(model):
            del network  # before the next one is loaded
            network = Network(model, auto_class, self.device)
        self._network, self._held = network, model
        return network

    @contextmanager
    def _failing(self, candidate: Candidate, tasks: Sequence[Task]) -> Iterator[None]:
        """Record failures and continue the evaluation."""
        try:
            yield
        except MergebenchError as error:
            self._fail(candidate, tasks, error)
        except (OSError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                if not isinstance(error, OSError):
                    raise
                self._fail(candidate, tasks, RunError(in_words(error)))  # a disk that fails, a file taken away
                return
            self._network = None
            names = ", ".join(f"'{task.name}'" for task in tasks)
            what = f"model '{candidate.name}': out of memory on {names}"
            self._fail(candidate, tasks, RunError(what, "measure it on a machine, or a --device, with more memory"))

    def _fail(self, candidate: Candidate, tasks: Sequence[Task], error: MergebenchError) -> None:
        log.info("%s failed: %s", candidate.name, error.message)
        for task in tasks:
            self.meter.close(candidate.name, task)
        self._part.fail(candidate.name, [task.name for task in tasks], error)


def _record(candidate: Candidate, task: Task, score: Score, seconds: float) -> Record:
    return Record(
        model=candidate.name,
        role=candidate.role,
        task=task.name,
        split=task.split,
        metric=score.metric,
        direction=score.direction,
        value=score.value,
        stderr=score.stderr,
        n=score.n,
        relative=None,
        seconds=seconds,
        predictions=score.predictions,
    )


class Meter:
    """Counts the items of all models and tasks, for a progress display."""

    def __init__(self, progress: Callable[[Step], None] | None, total: int) -> None:
        self.progress, self.total = progress, total
        self.counts: Counter[tuple[str, str]] = Counter()

    def of(self, model: str, task: str, known: bool = False) -> Callable[[int], None]:
        return lambda items: self.reach(model, task, self.counts[model, task] + items, known)

    def reach(self, model: str, task: str, items: int, known: bool = False) -> None:
        """So many items of a model and a task are done."""
        self.counts[model, task] = items
        if self.progress is not None:
            self.progress(Step(model, task, self.counts.total(), self.total, known))

    def close(self, model: str, task: Task) -> None:
        """Count the remaining items of a failed task as done."""
        self.reach(model, task.name, task.ready.n)
