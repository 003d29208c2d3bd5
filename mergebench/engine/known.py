"""Answers kept from one merge to the next of the same models: what a parameter does not change is not asked again.

A question depends on the parameters that the method has read when it asks (`questions.read_for`), and on the answers
before it, which depend on the same. So its answer holds for every merge in which these have the same values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mergebench.engine import questions
from mergebench.engine.answers import key_of
from mergebench.engine.plan import Plan, Unit


class Known:
    """The answers found so far, by unit, question and the parameters that it depends on.

    For merges that differ in nothing but their parameters.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Any] = {}

    def recall(self, plan: Plan) -> dict[str, list[Any]]:
        """The answers that hold for a plan, unit by unit, as a run's journal keeps them: the first so many."""
        found: dict[str, list[Any]] = {}
        for unit, keys in self._units(plan):
            answers = found.setdefault(unit, [])
            for key in keys:
                if key not in self._kept:
                    break
                answers.append(self._kept[key])
        return found

    def remember(self, plan: Plan, answers: dict[str, list[Any]]) -> None:
        """Take in what a run's journal holds."""
        for unit, keys in self._units(plan):
            self._kept.update(zip(keys, answers.get(unit, ()), strict=False))

    def _units(self, plan: Plan) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
        """What each unit's answers are kept under, and the key of each of its questions."""
        read: dict[int, list[tuple[Any, ...]]] = {}  # by parameters: what each question depends on
        for unit in (unit for group in plan.groups for unit in group.units):
            name = key_of(plan, unit)
            yield name, [(name, number, *self._depends(plan, unit, number, read)) for number in range(unit.passes)]

    def _depends(self, plan: Plan, unit: Unit, question: int, read: dict[int, list[tuple[Any, ...]]]) -> Iterator[Any]:
        """The values that a question about a unit depends on, in the order of its tensors where they differ."""
        merge, last = plan.merge, None
        for name in unit.tensors:
            params = merge.params_for(name)
            if params is last:
                continue
            if id(params) not in read:
                sets = questions.read_for(merge, params)
                read[id(params)] = [tuple((one, getattr(params, one)) for one in sorted(names)) for names in sets]
            yield (name, read[id(params)][question])
            last = params
