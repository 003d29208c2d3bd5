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
from mergebench.evaluation.search.history import Costs, History, Point
from mergebench.evaluation.search.objective import Objective
from mergebench.evaluation.search.space import Dimension, as_given, at_point
from mergebench.evaluation.search.strategies import STRATEGIES
from mergebench.evaluation.store import Store
from mergebench.recipe import Recipe

PATIENCE = 10  # times the budget: the most points that are requested, including points measured before
Values = Mapping[str, Any]  # of a point, by dimension
Measured = tuple[list[Record] | MergebenchError, float]  # on each task, or what failed; seconds


@dataclass(frozen=True)
class Arm:
    """A recipe that is searched, over `space`, with so many points of the budget, its own first."""

    recipe: Recipe
    space: tuple[Dimension, ...]
    strategy: str
    budget: int
    named: tuple[tuple[str, Any], ...] = ()  # what tells its points from those of other arms

    @property
    def given(self) -> Values:
        """The point of the recipe as given."""
        return self.point(as_given(self.space))

    def point(self, values: Values) -> Values:
        return {**dict(self.named), **values}

    def at(self, values: Values) -> Recipe:
        """The recipe at a point."""
        return at_point(self.recipe, self.space, values)


def arm_of(arms: Sequence[Arm], values: Values) -> Arm:
    """The arm that a point is of."""
    return next(arm for arm in arms if dict(arm.named).items() <= values.items())


@dataclass(frozen=True)
class Trial:
    """Merges points of recipes, and measures them on the tasks of a suite."""

    arms: Sequence[Arm]
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
        plan = self.candidates.plan(arm_of(self.arms, values).at(values))
        model = self.candidates.merge(plan, name)
        part = self.batch.measure(Candidate(name, "merged", model, key=self.candidates.key(plan)))
        if part.errors:
            raise part.errors[0]
        for record in part.records:
            if not math.isfinite(record.value):
                raise RunError(f"{record.metric} on task '{record.task}' is {record.value}")
        return part.records


class Search:
    """The search of one arm after another; `run` continues from the history to the end of each budget.

    cluster: machines whose workers try the points of a generation side by side. The points and their order depend on
    recipes and seed alone.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        suite: Suite,
        objectives: Sequence[Objective],
        candidates: Candidates,
        history: History,
        *,
        device: str,
        store: Store | None,
        progress: Callable[[Point], None],
        cluster: Cluster = (),
    ) -> None:
        self.arms, self.objectives, self.history, self.progress = arms, objectives, history, progress
        make = partial(_trial, arms, candidates, suite, device, store)
        self._try = _Cluster(cluster, make) if cluster else _Here(make())
        self.resumed = 0  # points that were there
        self._left = list(history.points)  # of an earlier run, to be taken instead of measured again
        history.points = []

    def run(self) -> None:
        """Raises the first point's error if no point could be measured."""
        try:
            for arm in self.arms:
                self._run(arm, len(self.history.points) + arm.budget)
        finally:
            self._try.close()
        if self.history.best is None:
            error = self.history.points[0].error
            raise RunError(f"no point could be measured; the first: {error}")

    def _run(self, arm: Arm, limit: int) -> None:
        """Points of one arm, until there are `limit`."""
        start = [one.place(one.own) for one in arm.space]
        self._costs([arm.given], limit)
        way = "front" if arm.strategy == "cmaes" and len(self.objectives) > 1 else arm.strategy
        strategy = STRATEGIES[way](arm.space, start, arm.budget - 1, self.history.made["seed"])
        asked, costs = 0, None
        while asked < PATIENCE * arm.budget and len(self.history.points) < limit:
            try:
                generation = next(strategy) if costs is None else strategy.send(costs)
            except StopIteration:  # a grid ends, and so does CMA-ES when nothing improves
                break
            asked += len(generation)
            points = [
                arm.point({one.name: one.at(place) for one, place in zip(arm.space, places, strict=True)})
                for places in generation
            ]
            costs = self._costs(points, limit)

    def _costs(self, generation: Sequence[Values], limit: int) -> list[Costs]:
        """The costs of points: measured, or known from the history; up to the first that the budget does not cover."""
        known = {_key(point.values): point for point in self.history.points}
        new: list[Values] = []
        for values in generation:
            if _key(values) in known or any(_key(one) == _key(values) for one in new):
                continue
            if len(self.history.points) + len(new) == limit:
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
        return [self.history.costs(known[_key(values)]) for values in generation if _key(values) in known]

    def _again(self, values: Values) -> Point | None:
        """The point from an earlier run."""
        point = self._left.pop(0) if self._left else None
        if point is not None and dict(point.values) != dict(values):
            raise RunError(f"{self.history.folder}: its points are others than this search asks for", "--overwrite")
        return point

    def _point(self, values: Values, found: list[Record] | MergebenchError, seconds: float) -> Point:
        number, error, records = len(self.history.points), None, list[Record]()
        values_of: dict[str, float] = {}
        stderrs: dict[str, float | None] = {}
        try:
            if isinstance(found, MergebenchError):
                raise found
            records = found
            reached = {one.name: one.of(records) for one in self.objectives}
            values_of = {name: value for name, (value, _) in reached.items()}
            stderrs = {one.name: one.stderr(records) for one in self.objectives}
            directions = {name: direction for name, (_, direction) in reached.items()}
            self.history.direction = next(iter(directions.values()))
            self.history.directions = directions if len(directions) > 1 else {}
            self.history.metrics |= {record.task: record.metric for record in records}
        except (RunError, ModelError) as failure:
            values_of, stderrs, error = {}, {}, failure.message
        tasks = {record.task: record.value for record in records}
        objective, stderr = next(iter(values_of.values()), None), next(iter(stderrs.values()), None)
        more = (values_of, stderrs) if len(values_of) > 1 else ()
        return Point(number, dict(values), tasks, objective, seconds, error, stderr, *more)


def _key(values: Values) -> tuple[Any, ...]:
    return tuple(sorted(values.items()))


def _trial(arms: Sequence[Arm], candidates: Candidates, suite: Suite, device: str, store: Store | None) -> Trial:
    return Trial(arms, candidates, Batch(suite, device, store))


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
