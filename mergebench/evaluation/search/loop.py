"""The search loop: ask a strategy for points, merge them, measure them on the validation tasks, return their costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mergebench.engine.cluster import Cluster
from mergebench.engine.pool import Call, Died, Pool, Worker
from mergebench.errors import DiskFull, MergebenchError, ModelError, RunError
from mergebench.evaluation import Candidate, Record, Suite
from mergebench.evaluation.batch import Batch
from mergebench.evaluation.search.candidates import Candidates
from mergebench.evaluation.search.history import History, Point
from mergebench.evaluation.search.objective import Objective
from mergebench.evaluation.search.space import Dimension, as_given, at_point
from mergebench.evaluation.search.strategies import STRATEGIES
from mergebench.evaluation.store import Store
from mergebench.recipe import Recipe

PATIENCE = 10  # times the budget: the most points that are requested, including points measured before
Values = Mapping[str, Any]  # of a point, by dimension
Measured = tuple[list[Record] | MergebenchError, float]  # on each task, or what failed; seconds


@dataclass(frozen=True)
class Trial:
    """Merges points of a recipe, and measures them on the tasks of a suite."""

    recipe: Recipe
    space: Sequence[Dimension]
    candidates: Candidates
    batch: Batch

    def measure(self, values: Values, name: str) -> Measured:
        """A point under a name for messages. Raises `DiskFull`, because the point is as good as others."""
        start = time.perf_counter()
        found: list[Record] | MergebenchError
        try:
            found = self._records(values, name)
        except DiskFull:
            raise
        except (RunError, ModelError) as error:
            found = error
        return found, round(time.perf_counter() - start, 3)

    def _records(self, values: Values, name: str) -> list[Record]:
        plan = self.candidates.plan(at_point(self.recipe, self.space, values))
        model = self.candidates.merge(plan, name)
        part = self.batch.measure(Candidate(name, "merged", model, key=self.candidates.key(plan)))
        if part.errors:
            raise part.errors[0]
        for record in part.records:
            if not math.isfinite(record.value):
                raise RunError(f"{record.metric} on task '{record.task}' is {record.value}")
        return part.records


class Search:
    """A recipe's search over `space`; `run` continues from the history to the end of the budget.

    cluster: machines whose workers try the points of a generation side by side. The points and their order depend on
    recipe and seed alone.
    """

    def __init__(
        self,
        recipe: Recipe,
        space: Sequence[Dimension],
        suite: Suite,
        objective: Objective,
        candidates: Candidates,
        history: History,
        *,
        device: str,
        store: Store | None,
        progress: Callable[[Point], None],
        cluster: Cluster = (),
    ) -> None:
        self.space, self.objective, self.history, self.progress = space, objective, history, progress
        make = partial(_trial, recipe, space, candidates, suite, device, store)
        self._try = _Cluster(cluster, make) if cluster else _Here(make())
        self.resumed = 0  # points that were there
        self._left = list(history.points)  # of an earlier run, to be taken instead of measured again
        history.points = []

    def run(self) -> None:
        """Raises the first point's error if no point could be measured."""
        made, given = self.history.made, as_given(self.space)
        start = [one.place(given[one.name]) for one in self.space]
        try:
            self._costs([given])
            strategy = STRATEGIES[made["strategy"]](self.space, start, made["budget"] - 1, made["seed"])
            asked, costs = 0, None
            while asked < PATIENCE * made["budget"] and len(self.history.points) < made["budget"]:
                try:
                    generation = next(strategy) if costs is None else strategy.send(costs)
                except StopIteration:  # a grid ends, and so does CMA-ES when nothing improves
                    break
                asked += len(generation)
                costs = self._costs(
                    [
                        {one.name: one.at(place) for one, place in zip(self.space, places, strict=True)}
                        for places in generation
                    ]
                )
        finally:
            self._try.close()
        if self.history.best is None:
            error = self.history.points[0].error
            raise RunError(f"no point could be measured; the recipe as given: {error}")

    def _costs(self, generation: Sequence[Values]) -> list[float]:
        """The costs of points: measured, or known from the history; up to the first that the budget does not cover."""
        known = {_key(point.values): point for point in self.history.points}
        new: list[Values] = []
        room = self.history.made["budget"] - len(known)
        for values in generation:
            if _key(values) in known or any(_key(one) == _key(values) for one in new):
                continue
            if len(new) == room:
                break
            new.append(values)
        while new and (again := self._again(new[0])) is not None:
            self.history.points.append(again)
            self.resumed += 1
            del new[0]
        number = len(self.history.points)
        waiting: dict[int, Measured] = {}
        for place, measured in self._try.measure([(one, f"point {number + i}") for i, one in enumerate(new)]):
            waiting[place] = measured
            while (following := len(self.history.points) - number) in waiting:  # in their order, whoever is first
                point = self._point(new[following], *waiting.pop(following))
                self.history.add(point)
                self.progress(point)
        known = {_key(point.values): point for point in self.history.points}
        return [self.history.cost(known[_key(values)]) for values in generation if _key(values) in known]

    def _again(self, values: Values) -> Point | None:
        """The point from an earlier run."""
        point = self._left.pop(0) if self._left else None
        if point is not None and dict(point.values) != dict(values):
            raise RunError(f"{self.history.folder}: its points are others than this search asks for", "--overwrite")
        return point

    def _point(self, values: Values, found: list[Record] | MergebenchError, seconds: float) -> Point:
        number, objective, error, stderr = len(self.history.points), None, None, None
        records: list[Record] = []
        try:
            if isinstance(found, MergebenchError):
                raise found
            records = found
            objective, self.history.direction = self.objective.of(records)
            stderr = self.objective.stderr(records)
            self.history.metrics |= {record.task: record.metric for record in records}
        except (RunError, ModelError) as failure:
            error = failure.message
        tasks = {record.task: record.value for record in records}
        return Point(number, dict(values), tasks, objective, seconds, error, stderr)


def _key(values: Values) -> tuple[Any, ...]:
    return tuple(sorted(values.items()))


def _trial(
    recipe: Recipe, space: Sequence[Dimension], candidates: Candidates, suite: Suite, device: str, store: Store | None
) -> Trial:
    return Trial(recipe, space, candidates, Batch(suite, device, store))


class _Here:
    """One point after another, in this process."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial

    def measure(self, points: Sequence[tuple[Values, str]]) -> Iterator[tuple[int, Measured]]:
        for place, point in enumerate(points):
            yield place, self._trial.measure(*point)

    def close(self) -> None:
        """Does nothing: no process was started."""


class _Cluster:
    """Points side by side, each whole on one worker."""

    def __init__(self, cluster: Cluster, make: Callable[[], Trial]) -> None:
        self._pool = Pool(cluster, make, models=True)

    def measure(self, points: Sequence[tuple[Values, str]]) -> Iterator[tuple[int, Measured]]:
        """The points' numbers among those given, as they are done."""
        calls = [Call(*point) for point in points]
        left = iter(calls)

        def take(worker: Worker) -> Call | None:
            return next(left, None)

        for _, call, answer in self._pool.each("measure", take):
            died = isinstance(answer, Died)
            yield calls.index(call), (RunError(f"the workers that try it die: {answer}"), 0.0) if died else answer

    def close(self) -> None:
        self._pool.close()
