"""Choosing a recipe's parameters: searched on a suite's validation tasks, reported on its test tasks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench import __version__
from mergebench.errors import RecipeError
from mergebench.evaluation.measure import inputs_of, read_suite
from mergebench.evaluation.search.history import BEST, GIVEN_POINT, WORK, History, Point, held
from mergebench.recipe import Recipe, load
from mergebench.recipe.open import folders
from mergebench.recipe.stages import default_out

if TYPE_CHECKING:
    import os

    from mergebench.evaluation import Candidate, Results, Step, Suite
    from mergebench.evaluation.compare.flips import Flips
    from mergebench.evaluation.search.candidates import Candidates
    from mergebench.evaluation.search.loop import Arm
    from mergebench.evaluation.search.space import Dimension

GIVEN, CHOSEN = "as given", "chosen"  # what follows the method's name in the table


def rows_of(recipe: Recipe) -> tuple[str, str]:
    """What the recipe as given and as chosen are called; where a model is only edited, by the edits."""
    only = recipe.merge_method == "passthrough" and recipe.edits
    name = " ".join(edit.edit for edit in recipe.edits) if only else recipe.merge_method
    return f"{name} {GIVEN}", f"{name} {CHOSEN}"


@dataclass(frozen=True)
class Found:
    """What a search found, and where it lies."""

    out: Path
    history: History
    results: Results | None  # on the test tasks; None where the suite has none
    difference: Flips | None = None  # of the chosen parameters to the given ones on all test items; None where equal
    resumed: int = 0  # points that an earlier run had measured

    @property
    def best(self) -> Point:
        best = self.history.best
        assert best is not None, "a search that finds nothing raises"
        return best

    def to_dict(self) -> dict[str, Any]:
        """The whole of it, ready for JSON."""
        from mergebench.evaluation import document_of

        return {
            "out": str(self.out),
            **self.history.to_dict(),
            "evaluation": None if self.results is None else document_of(self.results),
            "verdict": self.verdict(),
        }

    def verdict(self) -> str:
        """Whether the chosen parameters beat the given ones on test, in a sentence."""
        from mergebench.evaluation.tables.flips import p_of, signed, unit_of

        if self.best.number == GIVEN_POINT:
            return "Nothing was better on validation than the recipe as given."
        if self.results is None:
            return "The suite has no test tasks: whether the chosen parameters beat the given ones is not known."
        if self.difference is None:
            return "The test results of the chosen and the given parameters cannot be compared item by item."
        by = self.difference
        metric = unit_of(by, self.results.records[0].metric)
        unit = " percentage points" if by.share else ""
        every = sum(record.n for record in self.results.of(self.results.models[-1]).values())
        items = f"all {by.n:,} test items"
        if by.n != every:
            items = f"the {by.n:,} of {every:,} test items that count alike"
        size = f"{signed(by.difference, metric)}{unit} over {items}"
        if by.interval is not None and by.p is not None:
            low, high = (signed(end, metric) for end in by.interval)
            size += f" (95% interval {low} to {high}, p {p_of(by.p)})"
        if by.p is not None and by.p < 0.05:
            return f"On test the chosen parameters {'beat' if by.difference > 0 else 'lose to'} the given ones: {size}."
        return f"On test the chosen parameters do not differ from the given ones beyond chance: {size}."


def search(
    recipe: Recipe | str | os.PathLike[str],
    suite: Suite | str | os.PathLike[str] | None = None,
    over: Sequence[str] = ("lambda",),
    budget: int = 40,
    *,
    strategy: str | None = None,
    objective: str = "mean",
    seed: int = 0,
    out: str | Path | None = None,
    device: str = "auto",
    memory: int | None = None,
    workers: int | None = None,
    on: str | None = None,
    results: str | Path | None = "results",
    resume: bool = False,
    overwrite: bool = False,
    searched: Callable[[Point, History], None] = lambda point, history: None,
    progress: Callable[[Step], None] | None = None,
) -> Found:
    """Try up to `budget` parameters of a recipe, its own first, and write what was best into `out`.

    suite: with validation tasks, on which parameters are chosen; the recipe as given and the chosen one are then
    measured on the test tasks (None: the recipe's own suite). over: parameters, such as "lambda", "density=0.1:0.5"
    or "weight.*". strategy: grid, random or cmaes (None: a grid over one or two parameters, else cmaes). objective:
    mean, relative or worst. device, memory, workers: as of `mergebench.plan`. on: `ray` or `ray://HOST:PORT` tries the
    points of a generation side by side on that cluster, on so many `workers`. results: the folder that what was
    measured before is taken from, and kept in; None: none.
    searched: called after every point. progress: called while the test tasks are measured.

    Writes `search.json` after every point, then `best.yaml`, `evaluation.json`, `evaluation.md` and `report.html`.
    Raises `RecipeError` for what cannot be searched, `RunError` where no point can be measured.
    """
    from mergebench.evaluation import page, save
    from mergebench.evaluation.search import objective as objectives
    from mergebench.evaluation.search.loop import Arm
    from mergebench.evaluation.search.space import parse
    from mergebench.evaluation.search.strategies import choose

    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    if recipe.method.gives != "model":
        raise RecipeError(f"'{recipe.merge_method}' makes a model for each task: search looks for one for all tasks")
    if budget < 2:
        raise RecipeError(f"--budget {budget}: the recipe as given is the first point", "give it at least 2")
    space = parse(over, recipe)
    whole = _suite(recipe, suite)
    validation = whole.only("validation")
    check_tasks(whole)
    names = objectives.read(objective, validation)
    strategy = choose(strategy, space, len(names))
    target = Path(out) if out is not None else Path("searches") / default_out(recipe).name
    candidates, how = set_up(target, device, memory, workers, on, results)
    plan = candidates.plan(recipe)
    with held(target, resume=resume, overwrite=overwrite):
        made = {
            "mergebench": __version__,
            "recipe": recipe.to_dict(),
            "over": [one.to_plain() for one in space],
            "strategy": strategy,
            "budget": budget,
            "seed": seed,
            "objective": ",".join(names),
            "suite": about(validation),
            "merge": candidates.key(plan),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        history = History(target, made)
        if resume:
            history.resume()
        try:
            arm = Arm(recipe, space, strategy, budget)
            resumed = look([arm], validation, names, inputs_of(recipe), candidates, history, searched, how)
            best = history.best
            assert best is not None
            write_best([arm], history, target / BEST)
            found = _on_test(recipe, space, whole, best, candidates, how | {"progress": progress})
        finally:
            shutil.rmtree(target / WORK, ignore_errors=True)
        if found is not None:
            save(found, target)
        page.attempt(target)
    return Found(target, history, found, None if found is None else _difference(recipe, found), resumed)


def check_tasks(suite: Suite) -> None:
    """Refuse tasks that wait for the patches of a merge: a search has others at every point."""
    waiting = next((task.name for task in suite.tasks if task.ready.on_patches is not None), None)
    if waiting is not None:
        what = f"{suite.path or 'suite'}: task '{waiting}' is of one patch, a search makes another at every point"
        raise RecipeError(what, "name its patch (patch: FILE), or take the task out")


def set_up(
    target: Path, device: str, memory: int | None, workers: int | None, on: str | None, results: str | Path | None
) -> tuple[Candidates, dict[str, Any]]:
    """What merges the points of a search, and how they are measured; the arguments are those of `search`."""
    from mergebench.engine.cluster import join
    from mergebench.evaluation.search.candidates import Candidates
    from mergebench.evaluation.store import Store

    store = None if results is None else Store(Path(results))
    cluster = () if on is None else join(on, workers, models=True)
    limits: dict[str, Any] = {"workers": None if cluster else workers} | ({} if memory is None else {"memory": memory})
    return Candidates(target / WORK, device, **limits), {"device": device, "store": store, "cluster": cluster}


def look(
    arms: Sequence[Arm],
    validation: Suite,
    names: Sequence[str],
    inputs: Sequence[Candidate],
    candidates: Candidates,
    history: History,
    searched: Callable[[Point, History], None],
    how: dict[str, Any],
) -> int:
    """Search the arms for the objectives of these names; returns the points that an earlier run had measured."""
    from mergebench.evaluation.search.loop import Search
    from mergebench.evaluation.search.objective import make_objective

    goals = [make_objective(name, inputs, validation, how["device"], how["store"], how["cluster"]) for name in names]
    tell = partial(_tell, searched, history)
    running = Search(arms, validation, goals, candidates, history, progress=tell, **how)
    running.run()
    return running.resumed


def write_best(arms: Sequence[Arm], history: History, file: Path) -> None:
    """The best point as a recipe, and each of a front beside it."""
    from mergebench.evaluation.search.best import write_recipe
    from mergebench.evaluation.search.loop import arm_of

    best = history.best
    assert best is not None
    write_recipe(arm_of(arms, best.values).at(best.values), file, _comment(history, best, file))
    for point in history.front if history.several else ():
        place = file.with_name(front_file(point))
        write_recipe(arm_of(arms, point.values).at(point.values), place, _comment(history, point, place))


def _suite(recipe: Recipe, given: Suite | str | os.PathLike[str] | None) -> Suite:
    from mergebench.evaluation import Suite, load_suite

    if given is None:
        if recipe.evaluate is None:
            raise RecipeError("the recipe has no evaluate:, so there is nothing to choose by", "name it: --suite FILE")
        return read_suite(recipe)
    return given if isinstance(given, Suite) else load_suite(given, folders(recipe))


def about(suite: Suite) -> list[dict[str, Any]]:
    """What its tasks are, wherever their files lie."""
    return [{**task, "sha256": list(task["sha256"].values())} for task in suite.to_dict()["tasks"]]


def _tell(searched: Callable[[Point, History], None], history: History, point: Point) -> None:
    searched(point, history)


def front_file(point: Point) -> str:
    """The name of the recipe of a front's point."""
    return f"point-{point.number}.yaml"


def _comment(history: History, point: Point, file: Path) -> str:
    values = ", ".join(f"{name} {value}" for name, value in point.values.items())
    got = ", ".join(f"{name} {history.said(point, name)}" for name in history.objectives)
    how = f"{got} on validation, point {point.number} of 0 to {len(history.points) - 1}"
    return f"mergebench merge {file}\n\nChosen by mergebench search: {values} ({how})."


def _on_test(
    recipe: Recipe,
    space: Sequence[Dimension],
    suite: Suite,
    best: Point,
    candidates: Candidates,
    how: dict[str, Any],
) -> Results | None:
    """The recipe as given and as chosen beside what goes in, on the test tasks; None where there are none.

    how: as `evaluate_models` takes it.
    """
    from mergebench.evaluation import Candidate, evaluate_models
    from mergebench.evaluation.search.space import as_given, at_point

    if all(task.split != "test" for task in suite.tasks):
        return None
    given, chosen = rows_of(recipe)
    rows = inputs_of(recipe, (given, chosen))
    points = [(given, "baseline", as_given(space))] if best.number != GIVEN_POINT else []
    for name, role, values in [*points, (given if best.number == GIVEN_POINT else chosen, "merged", best.values)]:
        plan = candidates.plan(at_point(recipe, space, values))
        merged = partial(candidates.merge, plan, name)
        rows.append(Candidate(name, "merged" if role == "merged" else "baseline", merged, key=candidates.key(plan)))
    found = evaluate_models(rows, suite.only("test"), **how)
    return replace(found, made={**found.made, "baseline": given})


def _difference(recipe: Recipe, found: Results) -> Flips | None:
    """Of the chosen parameters to the given ones, over the items of all tasks that count alike."""
    from mergebench.evaluation.compare.comparison import compare

    given, chosen = rows_of(recipe)
    if not {given, chosen} <= {*found.models} or found.of(given).keys() != found.of(chosen).keys():
        return None  # one failed, on some task
    return compare(given, chosen, found).pooled
