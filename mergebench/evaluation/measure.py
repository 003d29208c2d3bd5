"""Measure a merged model beside its inputs, or any models side by side, on the tasks of a suite."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench.checkpoint import Model
from mergebench.checkpoint.files import write_atomically
from mergebench.checkpoint.staging import scratch
from mergebench.checkpoint.target import finished
from mergebench.deltas.formats.emr import FOLDER as TASKS
from mergebench.deltas.open import open_model
from mergebench.editing.patches import open_patch
from mergebench.engine.cluster import join
from mergebench.engine.plan import plan_merge
from mergebench.engine.run import run_plan
from mergebench.errors import MergebenchError, RecipeError, did_you_mean
from mergebench.evaluation.page import card
from mergebench.recipe import Baseline, Recipe
from mergebench.recipe.open import folders, short_names
from mergebench.recipe.resolve import open_all, resolve

if TYPE_CHECKING:
    from mergebench.engine.cluster import Cluster
    from mergebench.evaluation import Candidate, Results, Step, Suite
    from mergebench.evaluation.results import Role
    from mergebench.evaluation.store import Store


def read_suite(recipe: Recipe) -> Suite:
    """The recipe's suite with its data, read before the merge, so that its errors appear then."""
    from mergebench.evaluation import load_suite

    if recipe.evaluate is None:
        raise RecipeError("the recipe has no evaluate:", "add evaluate: {suite: FILE}")
    at = ("evaluate", "suite")
    suite = load_suite(recipe.evaluate.suite, folders(recipe), places=recipe.places, at=at, edited=bool(recipe.edits))
    for one in [recipe, *map(recipe.with_method, recipe.evaluate.baselines)]:
        if one.method.gives == "deltas":
            _task_of(one, suite)
    return suite


def _task_of(recipe: Recipe, suite: Suite) -> dict[str, str]:
    """For each task of the suite, the merge's own task whose model has the head in its directory."""
    merge = resolve(recipe)
    owners: dict[Path | None, str] = {}
    for model, name in zip(merge.models, merge.tasks, strict=True):
        place = model.own_directory()
        owners.setdefault(place and place.resolve(), name)
    found = {}
    for task in suite.tasks:
        home = task.ready.home
        if home is None or home.resolve() not in owners:
            what = f"'{merge.method.name}' makes a model for each input, task '{task.name}' is none of theirs"
            hint = "put its head beside the input it belongs to, or merge with --no-eval"
            raise recipe.places.error(("evaluate",), what, hint)
        found[task.name] = owners[home.resolve()]
    return found


def evaluate(
    recipe: Recipe,
    out: str | Path,
    *,
    suite: Suite | None = None,
    device: str = "auto",
    results: str | Path | None = "results",
    progress: Callable[[Step], None] | None = None,
    cluster: Cluster = (),
) -> Results:
    """Measure the merged model of a recipe beside its inputs, on the recipe's suite.

    Rows: the base, every input, the recipe's baselines (merged for the comparison, then deleted), the merge before its
    edits if the recipe has any (restored from the patches), the merged model. Writes `evaluation.json`,
    `evaluation.md`, the card's table, `statistics.json` and `report.html` into `out`. Earlier results are
    reused from the folder `results`, and new ones kept there; None: nothing is reused or kept. cluster: machines that
    measure side by side.
    """
    from mergebench.editing.summary import sentence
    from mergebench.evaluation import evaluate_models, save

    out = Path(out)
    suite = suite if suite is not None else read_suite(recipe)
    provenance, store = finished(out), _store(results)
    edits = (provenance or {}).get("edits") or [] if recipe.edits else []
    patches = [out / edit["patch"] for edit in edits]
    with scratch(out) if recipe.evaluate and recipe.evaluate.baselines else nullcontext(out) as folder:
        candidates = _candidates(recipe, out, suite, folder, device)
        if patches:
            before = _unedited(recipe, out, patches, store)
            candidates.insert(-1, before)
        how: Any = {"device": device, "store": store, "progress": progress, "cluster": cluster}
        found = evaluate_models(candidates, suite.on(patches), **how)
    if patches:
        told = {"unedited": {before.name: [sentence(edit) for edit in edits]}, "baseline": before.name}
        found = replace(found, made={**found.made, **told})
    save(found, out)
    show(recipe, out, found)
    return found


def show(recipe: Recipe, out: Path, found: Results) -> None:
    """Write what shows an evaluation that is in `out`: the card's table, `statistics.json`, and last `report.html`."""
    from mergebench.evaluation import markdown, page

    provenance = finished(out)
    if provenance is not None:
        write_atomically(out / "README.md", card.text(out, provenance, markdown(found)))
        page.look_at_merge(recipe, out, provenance)
    page.attempt(out)


def measure(
    suite: Suite | str | Path,
    models: Sequence[str],
    *,
    split: str | None = None,
    against: str | None = None,
    device: str = "auto",
    results: str | Path | None = "results",
    progress: Callable[[Step], None] | None = None,
    on: str | None = None,
    workers: int | None = None,
) -> Results:
    """Measure models side by side on the tasks of a suite, one model in memory at a time.

    models: as a recipe names them. split: test or validation (default: test if the suite has it). against: the model
    the others are compared with (default: the base, else the first). results: the folder whose earlier results are
    reused, and where new ones are kept; None: nothing is reused or kept. on: `ray` or `ray://HOST:PORT` measures on the
    machines of that cluster, with so many `workers` (None: one per GPU, or one on a machine without).
    """
    from mergebench.evaluation import evaluate_models, load_suite

    loaded = (load_suite(suite) if isinstance(suite, (str, Path)) else suite).only(split)
    names = short_names(list(models))
    if against is not None and against not in (*names, *models):
        raise RecipeError(f"--against: '{against}' is none of the models", did_you_mean(against, names))
    cluster = () if on is None else join(on, workers, models=True)
    how: Any = {"device": device, "store": _store(results), "progress": progress, "cluster": cluster}
    found = evaluate_models(_side_by_side(models), loaded, **how)
    if against is None:
        return found
    baseline = against if against in names else names[list(models).index(against)]
    return replace(found, made={**found.made, "baseline": baseline})


def measure_part(
    part: str,
    suite: Suite | str | Path,
    models: Sequence[str],
    *,
    split: str | None = None,
    device: str = "auto",
    results: str | Path = "results",
    progress: Callable[[Step], None] | None = None,
) -> list[tuple[str, str]]:
    """Measure one of several disjoint parts of what `measure` measures, such as "2/8", and keep it in `results`.

    Returns the models and tasks, of all parts, whose results are not there yet: none, and `measure` only makes the
    table. Raises the error of a model that fails, after the others are measured.
    """
    from mergebench.evaluation import load_suite
    from mergebench.evaluation import part as parts
    from mergebench.evaluation.store import Store

    number = parts.parse(part)
    loaded = (load_suite(suite) if isinstance(suite, (str, Path)) else suite).only(split)
    return parts.measure_part(number, _side_by_side(models), loaded, device, Store(Path(results)), progress)


def _side_by_side(models: Sequence[str]) -> list[Candidate]:
    """Models as rows of a table; one that cannot be opened fails when its turn comes."""
    from mergebench.evaluation import Candidate

    opened: list[Model | MergebenchError] = [_try_open(model) for model in models]
    bases = {place for model in opened if isinstance(model, Model) for place in _bases_of(model)}

    def candidate(name: str, model: Model | MergebenchError) -> Candidate:
        if isinstance(model, MergebenchError):
            return Candidate(name, "input", partial(_raise, model))
        place = model.own_directory()
        made = place is not None and finished(place) is not None
        role: Role = "base" if place is not None and place.resolve() in bases else "merged" if made else "input"
        return Candidate(name, role, model, place)

    return [candidate(name, model) for name, model in zip(short_names(list(models)), opened, strict=True)]


def _unedited(recipe: Recipe, out: Path, patches: Sequence[Path], store: Store | None) -> Candidate:
    """The merge before its edits, as a row to compare with."""
    from mergebench.checkpoint.content import sha256_of
    from mergebench.editing.undo import unedited
    from mergebench.evaluation import Candidate

    edited = open_model(str(out))
    key = None if store is None else " without ".join([str(store.content(edited)), *map(sha256_of, patches)])
    return Candidate(_before(recipe), "baseline", unedited(edited, [open_patch(one) for one in patches]), None, key)


def _before(recipe: Recipe) -> str:
    return f"{recipe.merge_method} unedited"


def _store(folder: str | Path | None) -> Store | None:
    from mergebench.evaluation.store import Store

    return None if folder is None else Store(Path(folder))


def _try_open(model: str) -> Model | MergebenchError:
    """Open a model, or return the error: one missing model must not stop the others."""
    try:
        return open_model(model, to_run=True)
    except MergebenchError as error:
        return error


def _raise(error: MergebenchError) -> Model:
    raise error


def _bases_of(model: Model) -> list[Path]:
    """The directories of the models that this model was made from."""
    if model.directory is None:
        return []
    if model.adapters:
        return [model.directory.resolve()]
    base = (finished(model.directory) or {}).get("recipe", {}).get("base_model")
    return [Path(base).resolve()] if isinstance(base, str) else []


def inputs_of(recipe: Recipe, taken: Collection[str] = ()) -> list[Candidate]:
    """The inputs of a merge as rows of a table: the base and every model, without names that are taken."""
    from mergebench.evaluation import Candidate

    origin, entries = open_all(recipe)
    base = None if origin is None else origin.own_directory()
    models = [model for _, model in entries]
    inputs = [m for m in models if not m.is_task_vector and (base is None or m.own_directory() != base)]
    taken = {"base", recipe.merge_method, *taken}
    names = [f"{n} (input)" if n in taken else n for n in short_names([model.reference for model in inputs])]
    found = [] if origin is None else [Candidate("base", "base", origin, base)]
    return found + [Candidate(n, "input", m, m.own_directory()) for n, m in zip(names, inputs, strict=True)]


def _candidates(recipe: Recipe, out: Path, suite: Suite, folder: Path, device: str) -> list[Candidate]:
    """The table's rows in order. A baseline is merged into `folder` when its turn comes."""
    from mergebench.evaluation import Candidate

    baselines = recipe.evaluate.baselines if recipe.evaluate else ()
    found = inputs_of(recipe, [_before(recipe), *(one.label for one in baselines)])

    def opened(made: Recipe, place: Path) -> Model | dict[str, Model]:
        if made.method.gives == "model":
            return open_model(str(place))
        tasks = _task_of(made, suite)
        root = f"{made.base_model}+{place}/{TASKS}"
        models = {name: open_model(f"{root}/{name}", folders=folders(made)) for name in tasks.values()}
        return {task: models[name] for task, name in tasks.items()}

    def merged(baseline: Baseline, place: Path) -> Model | dict[str, Model]:
        made = recipe.with_method(baseline)
        run_plan(plan_merge(resolve(made), device=device), place, overwrite=True)  # a worker may have died at it
        return opened(made, place)

    for number, one in enumerate(baselines):
        label = f"{one.label} (defaults)" if one.label == recipe.merge_method else one.label
        found.append(Candidate(label, "baseline", partial(merged, one, folder / str(number)), None))
    found.append(Candidate(recipe.merge_method, "merged", opened(recipe, out), None))
    return found
