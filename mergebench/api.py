"""The five steps, as the command line and Python users call them: load, plan, run, evaluate, report."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench import card
from mergebench.checkpoint import adopt, open_model
from mergebench.checkpoint.masked import FOLDER as TASKS
from mergebench.checkpoint.staging import check_target, finished
from mergebench.checkpoint.write import write_atomically
from mergebench.engine.merge import Merge
from mergebench.engine.plan import DEFAULT_MEMORY, SHARD_SIZE, Plan, plan_merge
from mergebench.engine.run import Result, run_plan
from mergebench.errors import RecipeError
from mergebench.methods import get as get_method
from mergebench.recipe import Baseline, Recipe, Stage
from mergebench.recipe.resolve import folders, open_all, open_named, resolve, short_names
from mergebench.recipe.stages import default_out, references

if TYPE_CHECKING:
    from mergebench.checkpoint import Model
    from mergebench.evaluation import Candidate, Results, Step, Suite


def plan(
    recipe: Recipe,
    *,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    device: str = "auto",
    shard_size: int = SHARD_SIZE,
    chunk: int | None = None,
) -> Plan:
    """Plan a recipe's merge from headers alone; raises where anything does not fit.

    memory: bytes for buffers and statistics. workers: processes or threads (None: one a core). device: auto, cpu or
    cuda. shard_size: bytes of an output file. chunk: elements, for tests; results do not depend on it.
    """
    with _no_collection():
        return plan_merge(
            resolve(recipe), memory=memory, workers=workers, device=device, shard_size=shard_size, chunk=chunk
        )


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: the small objects of a hundred thousand tensors all live, and looking for
    dead ones among them again and again takes four fifths of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def run(
    plan: Plan,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    sync: bool = False,
    hash_inputs: bool = False,
    verify: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Result:
    """Merge into the directory `out`, which appears when it is complete.

    resume: go on with what an interrupted run left. overwrite: replace an earlier result. sync: fsync
    (for power cuts). hash_inputs: record full hashes of the inputs. verify: load the result on `meta`.
    progress: called with the number of bytes just read, perhaps from several threads.
    """

    target = Path(out)
    if verify and plan.merge.method.gives == "tasks":
        what = f"--verify: '{plan.merge.method.name}' writes no model that transformers loads"
        raise RecipeError(what, "leave it out; BASE+OUT/tasks/NAME with merge_method: passthrough is one")

    def finish(directory: Path, provenance: dict[str, Any]) -> None:
        write_atomically(directory / "README.md", card.text(target, provenance))
        if verify:
            card.verify(directory)

    return run_plan(
        plan,
        target,
        resume=resume,
        overwrite=overwrite,
        sync=sync,
        hash_inputs=hash_inputs,
        progress=progress,
        finish=finish,
    )


def check_stages(stages: Sequence[Stage], *, resume: bool = False, overwrite: bool = False) -> None:
    """Before hours of merging: every model that is no stage's result is there, and no target is taken."""
    for stage in stages:
        if stage is not stages[-1] and finished(stage.out) is not None and not (resume or overwrite):
            hint = "use it with --resume, replace it with --overwrite, or choose another --out"
            raise RecipeError(f"{stage.out}: it holds a finished stage", hint)
        check_target(stage.out, [], overwrite or resume)
        for loc, text in references(stage.recipe):
            if not any(text == str(place) or text.startswith(f"{place}+") for place in stage.needs):
                open_named(stage.recipe, text, loc)
        for i, entry in enumerate(stage.recipe.models):
            if entry.task_vector is not None:
                open_named(stage.recipe, entry.task_vector, ("models", i, "task_vector"), task_vector=True)


def read_suite(recipe: Recipe) -> Suite:
    """The recipe's suite with its data: what is wrong with it shows before the merge, not after."""
    from mergebench.evaluation import load_suite

    if recipe.evaluate is None:
        raise RecipeError("the recipe has no evaluate:", "add evaluate: {suite: FILE}")
    at = ("evaluate", "suite")
    suite = load_suite(recipe.evaluate.suite, folders(recipe), places=recipe.places, at=at)
    for one in [recipe, *map(recipe.with_method, recipe.evaluate.baselines)]:
        if one.method.gives == "tasks":
            _task_of(one, suite)
    return suite


def _task_of(recipe: Recipe, suite: Suite) -> dict[str, str]:
    """For each of the suite's tasks, the one of the merge: its head lies beside the model that was merged."""
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
    progress: Callable[[Step], None] | None = None,
) -> Results:
    """Measure what a recipe made beside what went in, on the recipe's suite.

    Rows: the base, every input, the recipe's baselines (merged for the comparison, then deleted), the
    merged model. Writes `evaluation.json`, `evaluation.md` and the card's table into `out`.
    """
    from mergebench.evaluation import evaluate_models, markdown

    out = Path(out)
    suite = suite if suite is not None else read_suite(recipe)
    with tempfile.TemporaryDirectory(prefix="mergebench-") as folder:
        candidates = _candidates(recipe, out, suite, Path(folder), device)
        results = evaluate_models(candidates, suite, device=device, progress=progress)
    results.save(out)
    provenance = finished(out)
    if provenance is not None:
        write_atomically(out / "README.md", card.text(out, provenance, markdown(results)))
    return results


def _candidates(recipe: Recipe, out: Path, suite: Suite, folder: Path, device: str) -> list[Candidate]:
    """The table's rows in order. A baseline is merged into `folder` when its turn comes."""
    from mergebench.evaluation import Candidate

    origin, entries = open_all(recipe)
    base = None if origin is None else origin.own_directory()
    models = [model for _, model in entries]
    inputs = [m for m in models if not m.is_task_vector and (base is None or m.own_directory() != base)]
    baselines = recipe.evaluate.baselines if recipe.evaluate else ()
    taken = {"base", recipe.merge_method, *(one.label for one in baselines)}
    names = [f"{n} (input)" if n in taken else n for n in short_names([model.reference for model in inputs])]
    found = [] if origin is None else [Candidate("base", "base", origin, base)]
    found += [Candidate(n, "input", m, m.own_directory()) for n, m in zip(names, inputs, strict=True)]

    def opened(made: Recipe, place: Path) -> Model | dict[str, Model]:
        if made.method.gives == "model":
            return open_model(str(place))
        tasks = _task_of(made, suite)
        root = f"{made.base_model}+{place}/{TASKS}"
        models = {name: open_model(f"{root}/{name}", folders=folders(made)) for name in tasks.values()}
        return {task: models[name] for task, name in tasks.items()}

    def merged(baseline: Baseline, place: Path) -> Model | dict[str, Model]:
        made = recipe.with_method(baseline)
        run_plan(plan_merge(resolve(made), device=device), place)
        return opened(made, place)

    for number, one in enumerate(baselines):
        label = f"{one.label} (defaults)" if one.label == recipe.merge_method else one.label
        found.append(Candidate(label, "baseline", partial(merged, one, folder / str(number)), None))
    found.append(Candidate(recipe.merge_method, "merged", opened(recipe, out), None))
    return found


def task_vector(model: str, base: str, out: str | Path, *, dtype: str = "float32", overwrite: bool = False) -> Result:
    """Write `model` minus `base` as a checkpoint that a recipe can name with `task_vector:`."""
    linear = get_method("linear")
    origin = open_model(base)
    tuned = adopt(origin, open_model(model))
    merge = Merge(
        method=linear,
        params=linear.make_params({"weight": (1.0, -1.0), "normalize": False}),
        base=origin,
        models=(tuned, origin),
        names=("model", "base"),
        dtype=dtype,
        recipe={"task_vector": model, "base_model": base, "dtype": dtype},
    )
    return run_plan(plan_merge(merge), Path(out), overwrite=overwrite)


__all__ = ["Result", "check_stages", "default_out", "evaluate", "plan", "read_suite", "run", "task_vector"]
