"""The five steps, as the command line and Python users call them: load, plan, run, evaluate, report."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench import card
from mergebench.checkpoint import open_model
from mergebench.checkpoint.staging import PROVENANCE, finished
from mergebench.checkpoint.write import write_atomically
from mergebench.engine.merge import Merge
from mergebench.engine.plan import DEFAULT_MEMORY, SHARD_SIZE, Plan, plan_merge
from mergebench.engine.run import Result, run_plan
from mergebench.errors import RecipeError
from mergebench.methods import get as get_method
from mergebench.recipe import Recipe
from mergebench.recipe.resolve import folders, resolve, short_names

if TYPE_CHECKING:
    from mergebench.evaluation import Results


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

    memory: bytes for buffers and statistics. workers: threads (None: one a core). device: auto, cpu or
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


def default_out(recipe: Recipe) -> Path:
    """`merged/<recipe stem>`."""
    return Path("merged") / (recipe.path.stem if recipe.path else recipe.merge_method)


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
    progress: called with the number of bytes just read, from several threads.
    """

    target = Path(out)

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


def evaluate(
    recipe: Recipe, out: str | Path, *, device: str = "auto", progress: Callable[[str], None] | None = None
) -> Results:
    """Measure what a recipe made beside what went in, on the recipe's suite.

    Rows: the base, every input, the recipe's baselines (merged for the comparison, then deleted), the
    merged model. Writes `evaluation.json`, `evaluation.md` and the card's table into `out`.
    """
    from mergebench.evaluation import Candidate, evaluate_models, load_suite, markdown

    out = Path(out)
    if recipe.evaluate is None:
        raise RecipeError("the recipe has no evaluate:", "add evaluate: {suite: FILE}")
    suite = load_suite(recipe.evaluate.suite, folders(recipe))
    merge = resolve(recipe)
    candidates = []
    models = [model for model in merge.models if model is not merge.base and not model.is_task_vector]
    if merge.base is not None:
        candidates.append(Candidate("base", "base", merge.base, merge.base.own_directory()))
        models = [model for model in models if model.own_directory() != merge.base.own_directory()]
    names = short_names([model.reference for model in models])
    candidates += [Candidate(n, "input", m, m.own_directory()) for n, m in zip(names, models, strict=True)]
    with tempfile.TemporaryDirectory(prefix="mergebench-") as folder:
        for name in recipe.evaluate.baselines:
            place = Path(folder) / name
            run_plan(plan_merge(resolve(recipe.with_method(name)), device=device), place)
            candidates.append(Candidate(name, "baseline", open_model(str(place)), None))
        merged = open_model(str(out))
        candidates.append(Candidate(recipe.merge_method, "merged", merged, None))
        results = evaluate_models(candidates, suite, device=device, progress=progress)
    results.save(out)
    provenance = finished(out)
    if provenance is not None:
        write_atomically(out / "README.md", card.text(out, provenance, markdown(results)))
    return results


def task_vector(model: str, base: str, out: str | Path, *, dtype: str = "float32", overwrite: bool = False) -> Result:
    """Write `model` minus `base` as a checkpoint that a recipe can name with `task_vector:`."""
    linear = get_method("linear")
    tuned, origin = open_model(model), open_model(base)
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


__all__ = ["PROVENANCE", "Result", "default_out", "evaluate", "plan", "run", "task_vector"]
