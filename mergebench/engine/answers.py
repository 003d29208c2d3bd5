"""The answers to a method's questions: computed group by group, kept in the journal, and reused by a resumed run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from mergebench.engine import trace
from mergebench.engine.groups import Group, Unit
from mergebench.engine.plan import Plan
from mergebench.engine.statistics import Norms, decode, encode
from mergebench.engine.sweep import Missing, Sweeper


class Keeper(Protocol):
    """Keeps a run's answers in `journal["answers"]`, by tensor; implemented by `Staging`."""

    @property
    def journal(self) -> dict[str, Any]: ...

    def save(self) -> None: ...


def ask_of_all(plan: Plan, keeper: Keeper, sweeper: Sweeper) -> Any:
    """Ask all questions about all groups before anything is written; returns the combined last answer."""
    answers = []
    for group in plan.groups:
        answers += [known[-1] for known in answers_of(plan, keeper, sweeper, group)]
        keeper.save()
    return Norms.of_all([decode(answer) for answer in answers])


def answers_of(
    plan: Plan, keeper: Keeper, sweeper: Sweeper, group: Group, of_all: Any = None
) -> list[list[dict[str, Any]]]:
    """The answers about each unit of a group, encoded; missing answers are computed, but those about units of one tile
    only if the last question is about all groups together: else they are found where the unit is merged (`keep`).

    of_all: replaces the last answer if that is about all groups together. Answers are kept by tensor, or once for the
    model, because the grouping depends on the memory.
    """
    kept: dict[str, list[Any]] = keeper.journal["answers"]
    if not any(unit.passes for unit in group.units):
        return [[] for _ in group.units]
    known = [kept.get(key_of(plan, unit), [])[: unit.passes] for unit in group.units]
    missing = [number for number, unit in enumerate(group.units) if len(known[number]) < unit.passes]
    small = [number for number in missing if plan.is_one_tile(group.units[number].tensors[0])]
    if plan.asked_of_all:
        keep(plan, keeper, group, known, sweeper.answer_at_once(group, known, small))
    large = sorted({*missing}.difference(small))
    for question in range(plan.passes):
        asked = [number for number in large if len(known[number]) == question < group.units[number].passes]
        if not asked:
            continue
        found = sweeper.answer(group, known, asked)
        keep(plan, keeper, group, known, {number: [answer] for number, answer in found.items()})
        if plan.merge.scope == "model":
            keeper.save()  # do not lose a sweep over the whole model
    return known if of_all is None else [[*answers[:-1], encode(of_all)] for answers in known]


def keep(plan: Plan, keeper: Keeper, group: Group, known: list[list[dict[str, Any]]], found: Missing) -> None:
    """Add answers that were missing, by the number of their unit, to those known and to the journal."""
    for number, answers in found.items():
        known[number] = keeper.journal["answers"][key_of(plan, group.units[number])] = [*known[number], *answers]


def decoded(plan: Plan, kept: dict[str, list[Any]]) -> list[list[Any]]:
    """All answers about each unit of all groups, from the provenance of a merge; `KeyError` if any is missing."""
    known = [list(kept[key_of(plan, unit)]) if unit.passes else [] for unit in units_of(plan)]
    if not plan.asked_of_all:
        return known
    of_all = encode(Norms.of_all([decode(answers[-1]) for answers in known]))
    return [[*answers[:-1], of_all] for answers in known]


def units_of(plan: Plan) -> list[Unit]:
    """The units of all groups."""
    return [unit for group in plan.groups for unit in group.units]


def key_of(plan: Plan, unit: Unit) -> str:
    """The key of a unit's answers."""
    return "model" if plan.merge.scope == "model" else unit.tensors[0]


class Known:
    """Answers reused between merges of the same models: a question is not asked again if no parameter it depends on
    changed.

    A question depends on the parameters that the method has read when it asks (`trace.read_for`), and on the answers
    before it, which depend on the same. So an answer holds for every merge in which these parameters have the same
    values. The merges may differ only in parameters.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Any] = {}

    def recall(self, plan: Plan) -> dict[str, list[Any]]:
        """The leading answers that hold for a plan, unit by unit, in the form of a run's journal."""
        found: dict[str, list[Any]] = {}
        for unit, keys in self._units(plan):
            answers = found.setdefault(unit, [])
            for key in keys:
                if key not in self._kept:
                    break
                answers.append(self._kept[key])
        return found

    def remember(self, plan: Plan, answers: dict[str, list[Any]]) -> None:
        """Add the answers of a run's journal."""
        for unit, keys in self._units(plan):
            self._kept.update(zip(keys, answers.get(unit, ()), strict=False))

    def _units(self, plan: Plan) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
        """The key of each unit's answers, and the keys of its questions."""
        read: dict[int, list[tuple[Any, ...]]] = {}  # by parameters: the dependencies of each question
        for unit in (unit for group in plan.groups for unit in group.units):
            name = key_of(plan, unit)
            yield name, [(name, number, *self._depends(plan, unit, number, read)) for number in range(unit.passes)]

    def _depends(self, plan: Plan, unit: Unit, question: int, read: dict[int, list[tuple[Any, ...]]]) -> Iterator[Any]:
        """The values that a question about a unit depends on; in the order of its tensors if they differ."""
        merge, last = plan.merge, None
        for name in unit.tensors:
            params = merge.params_for(name)
            if params is last:
                continue
            if id(params) not in read:
                sets = trace.read_for(merge, params)
                read[id(params)] = [tuple((one, getattr(params, one)) for one in sorted(names)) for names in sets]
            yield (name, read[id(params)][question])
            last = params
