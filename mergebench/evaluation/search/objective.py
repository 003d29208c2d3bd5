"""The objectives of a search: numbers from a model's values on the validation tasks, usually one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergebench.engine.cluster import Cluster
from mergebench.errors import RecipeError, RunError, did_you_mean
from mergebench.evaluation import Candidate, Record, Suite, evaluate_models
from mergebench.evaluation.run import homes_of
from mergebench.evaluation.store import Store

NAMES = {
    "mean": "mean of the tasks' values",
    "relative": "mean share of what each task's own fine-tune reaches",
    "worst": "smallest of those shares",
}


@dataclass(frozen=True)
class Objective:
    """One of `NAMES`, or a task by its name. own: for the last two of `NAMES`, the value of each task's own fine-tune,
    or of the best model if the fine-tune is not known."""

    name: str
    own: Mapping[str, float]

    def of(self, records: Sequence[Record]) -> tuple[float, str]:
        """The objective of one model's records, and its direction: whether higher or lower is better."""
        if self.name not in NAMES:
            return self._task(records).value, self._task(records).direction
        if self.name == "mean":
            metrics = {(record.metric, record.direction) for record in records}
            if len(metrics) > 1:
                names = ", ".join(sorted(metric for metric, _ in metrics))
                what = f"--objective mean: the tasks have different metrics ({names})"
                raise RecipeError(
                    what, "take --objective relative or worst, which compare each task with the models that are merged"
                )
            return sum(record.value for record in records) / len(records), records[0].direction
        shares = [self._share(record) for record in records]
        return (min(shares) if self.name == "worst" else sum(shares) / len(shares)), "higher"

    def stderr(self, records: Sequence[Record]) -> float | None:
        """The standard error of the objective: tasks have other items, so their errors are independent. The fine-tunes'
        values, of `relative`, and which task is the worst, are taken as known. None where a task has no error."""
        errors: list[float] = []
        if self.name not in NAMES:
            return self._task(records).stderr
        for record in records:
            if record.stderr is None:
                return None
            scale = 1.0 if self.name == "mean" else self._share(record) / record.value if record.value else 0.0
            errors.append(scale * record.stderr)
        if self.name == "worst":
            return errors[min(range(len(records)), key=lambda place: self._share(records[place]))]
        return math.sqrt(sum(error**2 for error in errors)) / len(errors)

    def _task(self, records: Sequence[Record]) -> Record:
        return next(record for record in records if record.task == self.name)

    def _share(self, record: Record) -> float:
        parts = (record.value, self.own[record.task])
        value, own = parts if record.direction == "higher" else parts[::-1]
        if not own:
            raise RunError(f"--objective {self.name}: a value of 0 on task '{record.task}' has no share", "take mean")
        return value / own


def read(text: str, suite: Suite) -> tuple[str, ...]:
    """The names in `mean` or `profanity,news`: of `NAMES`, or of tasks of the suite, which may hold commas."""
    known = dict.fromkeys([*NAMES, *(task.name for task in suite.tasks)])
    words, found = text.split(","), list[str]()
    while words:
        ways = [",".join(words[:count]).strip() for count in range(len(words), 0, -1)]
        name = next((one for one in ways if one in known), None)
        if name is None:
            near = did_you_mean(ways[-1], known) or f"{', '.join(known)}, or two of them for a front: A,B"
            raise RecipeError(f"--objective: '{ways[-1]}' is none", near)
        if name in found:
            raise RecipeError(f"--objective {text}: {name} is named twice", "name two different ones for a front")
        found.append(name)
        del words[: name.count(",") + 1]
    return tuple(found)


def make_objective(
    name: str, inputs: Sequence[Candidate], suite: Suite, device: str, store: Store | None, cluster: Cluster = ()
) -> Objective:
    """The objective of that name; if it needs the models' values, they are measured first."""
    if name not in ("relative", "worst"):
        return Objective(name, {})
    homes = homes_of(inputs, suite)
    own: dict[str, float] = {}
    for one in (candidate for candidate in inputs if candidate.role == "input"):
        tasks = tuple(task for task in suite.tasks if homes.get(task.name, one.name) == one.name)
        if tasks:
            how: Any = {"device": device, "store": store, "cluster": cluster}
            for record in evaluate_models([one], replace(suite, tasks=tasks), **how).records:
                better = max if record.direction == "higher" else min
                own[record.task] = better(record.value, own.get(record.task, record.value))
    if missing := [task.name for task in suite.tasks if task.name not in own]:
        raise RunError(f"--objective {name}: no model could be measured on task '{missing[0]}' to compare with")
    return Objective(name, own)
