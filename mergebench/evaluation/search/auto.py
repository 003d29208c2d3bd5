"""The automatic choice of a merge: a few methods tried on validation tasks, the best measured on test tasks.

What is chosen is the simplest method that cannot be told apart from the best one on the validation items.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench import __version__
from mergebench.errors import ModelError, RecipeError, RunError
from mergebench.evaluation.search.history import BEST, WORK, History, Point, held
from mergebench.evaluation.search.verdict import CERTAIN, told_apart, verdict
from mergebench.recipe import Recipe, load

if TYPE_CHECKING:
    import os

    from mergebench.evaluation import Candidate, Results, Step, Suite
    from mergebench.evaluation.search.candidates import Candidates
    from mergebench.evaluation.search.loop import Arm

MODEL = "model"  # the checkpoint's directory, in the output directory
AVERAGE = "linear"
# The methods from the simplest to the most intricate, with what is varied of each, around the values that did well on
# four fine-tunes of an encoder (benchmarks/RESULTS.md): lambda decides more than the method does.
METHODS: Mapping[str, tuple[dict[str, float], str]] = {
    AVERAGE: ({}, ""),
    "task_arithmetic": ({"lambda": 0.4}, "lambda=0.3/0.4/0.5/0.7/1"),
    "ties": ({"density": 0.4, "lambda": 1.0}, "density=0.2/0.4,lambda=0.7/1/1.4"),
    "pcb": ({"density": 0.3, "lambda": 1.0}, "density=0.1/0.3,lambda=0.7/1/1.4"),
    "tsv_m": ({"lambda": 0.7}, "lambda=0.4/0.7/1"),
}


def budget(tried: Mapping[str, tuple[Mapping[str, Any], str]] = METHODS) -> int:
    """How many candidates there are, where every method can merge the models."""
    return sum(prod(word.count("/") + 1 for word in over.split(",")) for _, over in tried.values())


@dataclass(frozen=True)
class Auto:
    """What the automatic mode found, and where it lies."""

    out: Path
    history: History
    chosen: Point
    recipe: Recipe  # of what was chosen
    results: Results | None  # on the test tasks; None where the suite has none
    verdict: str  # a line: what was found, and how sure that is
    notes: tuple[str, ...] = ()
    resumed: int = 0  # points that an earlier run had measured

    @property
    def model(self) -> Path:
        """The checkpoint."""
        return self.out / MODEL

    def to_dict(self) -> dict[str, Any]:
        """The whole of it, ready for JSON."""
        from mergebench.evaluation import document_of

        return {
            "out": str(self.out),
            "model": str(self.model),
            **self.history.to_dict(),
            "chosen": self.chosen.number,
            "evaluation": None if self.results is None else document_of(self.results),
            "notes": list(self.notes),
            "verdict": self.verdict,
        }


def choose_merge(
    base: str,
    models: Sequence[str],
    suite: Suite | str | os.PathLike[str] | None,
    *,
    out: str | Path,
    device: str = "auto",
    memory: int | None = None,
    workers: int | None = None,
    on: str | None = None,
    results: str | Path | None = "results",
    resume: bool = False,
    overwrite: bool = False,
    searched: Callable[[Point, History], None] = lambda point, history: None,
    progress: Callable[[Step], None] | None = None,
) -> Auto:
    """Try merges of the models on the suite's validation tasks, and measure the chosen one on its test tasks.

    As `mergebench.auto`, which writes what was chosen.
    """
    from mergebench.evaluation import Suite, load_suite, page, save
    from mergebench.evaluation.measure import inputs_of
    from mergebench.evaluation.search.best import write_recipe
    from mergebench.evaluation.search.loop import arm_of
    from mergebench.evaluation.search.search import about, look, set_up

    if len(models) < 2:
        raise RecipeError(
            f"auto merges two models or more, got {len(models)}", "mergebench auto BASE A B --suite SUITE"
        )
    if suite is None:
        raise RecipeError("auto: no suite, so there is nothing to choose by", "name it: --suite FILE")
    whole = suite if isinstance(suite, Suite) else load_suite(suite)
    validation = whole.only("validation")
    target = Path(out)
    candidates, how = set_up(target, device, memory, workers, on, results)
    arms, notes = _arms(base, models, candidates)
    inputs = inputs_of(arms[0].recipe, _labels(arms))
    with held(target, resume=resume, overwrite=overwrite):
        made = {
            "mergebench": __version__,
            "recipe": arms[0].recipe.to_dict(),
            "over": [{"name": dict(arm.named)["method"], "over": [d.to_plain() for d in arm.space]} for arm in arms],
            "strategy": "grid",
            "budget": budget(),
            "seed": 0,
            "objective": "",
            "start": "plain average",
            "suite": about(validation),
            "merge": candidates.key(candidates.plan(arms[0].recipe)),
        }
        try:
            average = row_of(arms, arms[0].given, candidates)
            records = _evaluate([average], validation, how, progress).records
            objective = "mean" if len({(record.metric, record.direction) for record in records}) == 1 else "relative"
            made["objective"] = objective
            history = History(target, made)
            if resume:
                history.resume()
            resumed = look(arms, validation, [objective], inputs, candidates, history, searched, how)
            chosen, why = _choose(arms, history, validation, candidates, how)
            label, single, found = label_of(chosen.values), "", None
            if any(task.split == "test" for task in whole.tasks):
                rows = [*inputs, *(row_of(arms, point.values, candidates) for point in _average(history, chosen))]
                rows.append(replace(row_of(arms, chosen.values, candidates), role="merged"))
                found = _evaluate(rows, whole.only("test"), how, progress)
                single = _best(found, [one for one in inputs if one.role == "input"])
                found = replace(found, made={**found.made, "baseline": single, "chosen": label})
            recipe = arm_of(arms, chosen.values).at(chosen.values)
            write_recipe(recipe, target / BEST, f"mergebench merge {target / BEST}\n\nChosen by mergebench auto.")
            if found is not None:
                save(found, target)
        finally:
            shutil.rmtree(target / WORK, ignore_errors=True)
        said = verdict(label, single, found, tried=len(history.points), why=why, average=AVERAGE)
        page.attempt(target)
    return Auto(target, history, chosen, recipe, found, said, tuple(notes), resumed)


def show(found: Auto) -> None:
    """Write the evaluation, the card's table and the page into the directory of the checkpoint, once it is there."""
    from mergebench.evaluation import measure, save

    if found.results is not None:
        save(found.results, found.model)
        measure.show(found.recipe, found.model, found.results)


def label_of(point: Mapping[str, Any]) -> str:
    """`ties density 0.4 lambda 1`, of a point's values."""
    values = dict(point)
    name = values.pop("method", None) or values.pop("edit", "")
    return " ".join([str(name), *(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                                  for key, value in values.items())])  # fmt: skip


def _arms(base: str, models: Sequence[str], candidates: Candidates) -> tuple[list[Arm], list[str]]:
    """A search of each method that can merge these models, and notes on those that cannot."""
    arms: list[Arm] = []
    notes: list[str] = []
    for name, (parameters, over) in METHODS.items():
        entries = [{"model": model} for model in models]
        recipe = load({"merge_method": name, "base_model": base, "models": entries, "parameters": parameters})
        try:
            candidates.plan(recipe)
        except (RunError, RecipeError, ModelError) as error:
            if not arms:  # what the average cannot be planned for, nothing can; there is no recipe to look into
                raise type(error)(error.message.removeprefix("recipe: "), error.hint) from None
            notes.append(f"{name} is left out: {error.message}")
            continue
        arms.append(grid_arm(recipe, over, ("method", name)))
    return arms, notes


def grid_arm(recipe: Recipe, over: str, named: tuple[str, str]) -> Arm:
    """The search of all of a grid; over: as of `search`, empty for the recipe alone."""
    from mergebench.evaluation.search.loop import Arm
    from mergebench.evaluation.search.space import parse

    space = parse([over], recipe) if over else ()
    return Arm(recipe, space, "grid", prod(len(one.choices) for one in space) + 1, (named,))


def _labels(arms: Sequence[Arm]) -> list[str]:
    """Names that no input may have in the table."""
    return [str(value) for arm in arms for _, value in arm.named]


def row_of(arms: Sequence[Arm], values: Mapping[str, Any], candidates: Candidates) -> Candidate:
    """A point as a row of a table."""
    from mergebench.evaluation import Candidate
    from mergebench.evaluation.search.loop import arm_of

    label, plan = label_of(values), candidates.plan(arm_of(arms, values).at(values))
    return Candidate(label, "baseline", partial(candidates.merge, plan, label), key=candidates.key(plan))


def _evaluate(
    rows: Sequence[Candidate], suite: Suite, how: dict[str, Any], progress: Callable[[Step], None] | None
) -> Results:
    from mergebench.evaluation import evaluate_models

    found = evaluate_models(rows, suite, progress=progress, **how)
    for failed in found.made.get("failed", ()):  # nothing can be chosen without it
        raise RunError(f"{failed['model']} on {', '.join(failed['tasks'])}: {failed['error']}", failed["hint"])
    return found


def _best(found: Results, models: Sequence[Candidate]) -> str:
    """The model of the best mean; where tasks have different metrics, of the best mean rank."""
    ranks = {one.name: 0.0 for one in models}
    same = len({(record.metric, record.direction) for record in found.records}) == 1
    for task in found.tasks:
        records = {name: found.of(name)[task] for name in ranks}
        sign = -1.0 if next(iter(records.values())).direction == "higher" else 1.0
        for name, record in records.items():
            better = sum(sign * other.value < sign * record.value for other in records.values())
            ranks[name] += sign * record.value if same else better
    return min(ranks, key=lambda name: ranks[name])


def _average(history: History, chosen: Point) -> list[Point]:
    """The plain average, where it is not what was chosen and could be measured."""
    first = history.points[0]
    return [] if first.number == chosen.number or first.objective is None else [first]


def _choose(
    arms: Sequence[Arm], history: History, validation: Suite, candidates: Candidates, how: dict[str, Any]
) -> tuple[Point, str]:
    """The simplest arm's best point that the validation items do not tell apart from the best of all, and a clause on
    why."""
    from mergebench.evaluation.search.loop import arm_of

    best = history.best
    assert best is not None
    ranked = [(arms.index(arm_of(arms, point.values)), point) for point in history.ranked]
    simpler = [next(point for at, point in ranked if at == place) for place in sorted({at for at, _ in ranked})]
    simpler = simpler[: simpler.index(best)]
    if not simpler:
        return best, ""
    rows = [row_of(arms, point.values, candidates) for point in [*simpler, best]]
    found, name = _evaluate(rows, validation, how, None), label_of(best.values)
    for top in simpler:
        by = told_apart(label_of(top.values), name, found)
        if by is not None and (by.p is None or by.p >= CERTAIN):
            return top, f"simpler than {name}, which validation does not tell apart from it"
    return best, ""
