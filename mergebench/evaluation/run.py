"""Measuring candidates on a suite, one model in memory at a time."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mergebench
from mergebench.errors import RecipeError, RunError
from mergebench.evaluation.results import Record, Results, Role, with_relatives
from mergebench.evaluation.suite import Suite, Task

if TYPE_CHECKING:
    import torch

    from mergebench.evaluation.network import Network
    from mergebench.evaluation.task import LoadableModel

    Measured = LoadableModel | Mapping[str, LoadableModel]


@dataclass(frozen=True)
class Candidate:
    """A model to measure, or one for each task by its name. Given as a function, it is opened when its turn comes."""

    name: str
    role: Role
    model: Measured | Callable[[], Measured]
    directory: Path | None = None  # the model's own: a task whose head lies there has this for its fine-tune


@dataclass(frozen=True)
class Step:
    """How far an evaluation is: items of all models and tasks."""

    model: str
    task: str
    done: int
    total: int


def evaluate_models(
    candidates: Sequence[Candidate],
    suite: Suite,
    *,
    device: str = "auto",
    progress: Callable[[Step], None] | None = None,
) -> Results:
    """Measure every candidate on every task, in the given order, in float32.

    `device`: auto (CUDA where there is one), cpu or cuda. On one device the predictions depend on the
    models and the suite alone, not on the number of cores.
    """
    twice = [name for name, count in Counter(candidate.name for candidate in candidates).items() if count > 1]
    if twice:
        raise RecipeError(f"two models to measure are called '{twice[0]}'", "name each model once")
    place = _device(device)
    start, date = time.perf_counter(), datetime.now(UTC)
    meter = _Meter(progress, len(candidates) * suite.items)
    records: list[Record] = []
    by_task: list[str] = []  # candidates with a model for each task
    for candidate in candidates:
        model = candidate.model() if callable(candidate.model) else candidate.model
        by_task += [candidate.name] if isinstance(model, Mapping) else []
        records += _records(candidate, model, suite, place, meter)
    made = {**_versions(), "suite": suite.to_dict(), "device": str(place), "date": date.isoformat(timespec="seconds")}
    made |= {"by_task": by_task} if by_task else {}
    made["seconds"] = round(time.perf_counter() - start, 3)
    return Results(made, with_relatives(records, _homes(candidates, suite)))


def _records(candidate: Candidate, model: Measured, suite: Suite, device: torch.device, meter: _Meter) -> list[Record]:
    """One candidate's records in the order of the suite; tasks of one network class share a model in memory."""
    from mergebench.evaluation.network import Network

    each = model if isinstance(model, Mapping) else {task.name: model for task in suite.tasks}
    sharing: dict[tuple[str, int], list[Task]] = {}
    for task in suite.tasks:
        sharing.setdefault((task.kind.network, id(each[task.name])), []).append(task)
    found: dict[str, Record] = {}
    for (network_class, _), tasks in sharing.items():
        network = Network(each[tasks[0].name], network_class, device)
        for task in tasks:
            found[task.name] = _measure(candidate, task, network, meter)
        del network  # before the next one comes
    return [found[task.name] for task in suite.tasks]


def _measure(candidate: Candidate, task: Task, network: Network, meter: _Meter) -> Record:
    start = time.perf_counter()
    score = task.ready.measure(network, meter.of(candidate.name, task.name))
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
        seconds=round(time.perf_counter() - start, 3),
        predictions=score.predictions,
    )


class _Meter:
    """Counts the items of all models and tasks for whoever shows the progress."""

    def __init__(self, progress: Callable[[Step], None] | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def of(self, model: str, task: str) -> Callable[[int], None]:
        def tick(items: int) -> None:
            self.done += items
            if self.progress is not None:
                self.progress(Step(model, task, self.done, self.total))

        return tick


def _homes(candidates: Sequence[Candidate], suite: Suite) -> dict[str, str]:
    """Each task's own fine-tune: the input model whose directory holds the task's head."""
    owners: dict[Path, str] = {}
    for candidate in candidates:
        if candidate.role == "input" and candidate.directory is not None:
            owners.setdefault(candidate.directory.resolve(), candidate.name)
    homes = {task.name: task.ready.home.resolve() for task in suite.tasks if task.ready.home is not None}
    return {task: owners[home] for task, home in homes.items() if home in owners}


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name.startswith("cuda") and not torch.cuda.is_available():
        raise RunError("no CUDA device is to be had", "choose --device cpu")
    return torch.device(name)


def _versions() -> dict[str, Any]:
    import torch
    import transformers

    return {
        "mergebench": mergebench.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
