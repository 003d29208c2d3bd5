"""The search loop: ask a strategy for a point, merge it, measure it on the validation tasks, return its cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergebench.errors import DiskFull, ModelError, RunError
from mergebench.evaluation import Candidate, Record, Suite
from mergebench.evaluation.run import Batch
from mergebench.evaluation.search.candidates import Candidates
from mergebench.evaluation.search.history import History, Point
from mergebench.evaluation.search.objective import Objective
from mergebench.evaluation.search.space import Dimension, as_given, at_point
from mergebench.evaluation.search.strategies import STRATEGIES
from mergebench.evaluation.store import Store
from mergebench.recipe import Recipe

PATIENCE = 10  # times the budget: the most points that are requested, including points measured before


class Search:
    """A recipe's search over `space`; `run` continues from the history to the end of the budget."""

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
    ) -> None:
        self.recipe, self.space, self.objective = recipe, space, objective
        self.candidates, self.history, self.progress = candidates, history, progress
        self._batch = Batch(suite, device, store)
        self.resumed = 0  # points that were there
        self._left = list(history.points)  # of an earlier run, to be taken instead of measured again
        history.points = []

    def run(self) -> None:
        """Raises the first point's error if no point could be measured."""
        made, given = self.history.made, as_given(self.space)
        start = [one.place(given[one.name]) for one in self.space]
        self._try(given)
        points = STRATEGIES[made["strategy"]](self.space, start, made["budget"] - 1, made["seed"])
        cost: float | None = None
        try:
            for _ in range(PATIENCE * made["budget"]):
                if len(self.history.points) == made["budget"]:
                    break
                places = next(points) if cost is None else points.send(cost)
                cost = self._try({one.name: one.at(place) for one, place in zip(self.space, places, strict=True)})
        except StopIteration:
            pass  # a grid ends, and so does CMA-ES when nothing improves
        if self.history.best is None:
            error = self.history.points[0].error
            raise RunError(f"no point could be measured; the recipe as given: {error}")

    def _try(self, values: Mapping[str, Any]) -> float:
        """The cost of a point: measured, or known from the history."""
        known = next((point for point in self.history.points if dict(point.values) == dict(values)), None)
        if known is None:
            known = self._again(values)
            if known is not None:
                self.history.points.append(known)
                self.resumed += 1
            else:
                known = self._measured(values)
                self.history.add(known)
                self.progress(known)
        return self.history.cost(known)

    def _again(self, values: Mapping[str, Any]) -> Point | None:
        """The point from an earlier run."""
        point = self._left.pop(0) if self._left else None
        if point is not None and dict(point.values) != dict(values):
            raise RunError(f"{self.history.folder}: its points are others than this search asks for", "--overwrite")
        return point

    def _measured(self, values: Mapping[str, Any]) -> Point:
        start, number = time.perf_counter(), len(self.history.points)
        objective, error, stderr = None, None, None
        records: list[Record] = []
        try:
            records = self._records(values, f"point {number}")
            objective, self.history.direction = self.objective.of(records)
            stderr = self.objective.stderr(records)
            self.history.metrics |= {record.task: record.metric for record in records}
        except DiskFull:  # the point is as good as others
            raise
        except (RunError, ModelError) as failure:
            error = failure.message
        tasks = {record.task: record.value for record in records}
        return Point(number, dict(values), tasks, objective, round(time.perf_counter() - start, 3), error, stderr)

    def _records(self, values: Mapping[str, Any], name: str) -> list[Record]:
        """One on each task, in their order; raises what failed."""
        plan = self.candidates.plan(at_point(self.recipe, self.space, values))
        model = self.candidates.merge(plan, name)
        batch = self._batch
        batch.records, batch.errors = [], []
        batch.measure(Candidate(name, "merged", model, key=self.candidates.key(plan)))
        if batch.errors:
            raise batch.errors[0]
        for record in batch.records:
            if not math.isfinite(record.value):
                raise RunError(f"{record.metric} on task '{record.task}' is {record.value}")
        return batch.records
