"""Planning and running a merge, as the command line and Python users call it; measuring is in `measuring.py`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergebench import card, edits
from mergebench.adapters.stored import read_stored
from mergebench.checkpoint import adopt, open_model
from mergebench.checkpoint.staging import Staging, check_target, finished
from mergebench.checkpoint.write import write_atomically
from mergebench.engine.merge import Merge
from mergebench.engine.plan import DEFAULT_MEMORY, SHARD_SIZE, Plan, plan_merge
from mergebench.engine.run import Result, run_plan
from mergebench.errors import MergebenchError, ModelError, RecipeError
from mergebench.methods import get as get_method
from mergebench.recipe import Recipe, Stage, load
from mergebench.recipe.resolve import find_file, folders, open_named, resolve
from mergebench.recipe.stages import default_out, references


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
        planned = plan_merge(
            resolve(recipe), memory=memory, workers=workers, device=device, shard_size=shard_size, chunk=chunk
        )
        return with_edits(planned, recipe)


def with_edits(plan: Plan, recipe: Recipe) -> Plan:
    """The plan with the recipe's edits of what it gives, checked against that."""
    if not recipe.edits:
        return plan
    from mergebench.editing.planned import plan_edit

    reference = plan.merge.reference
    tensors = {info.name: info._replace(dtype=plan.dtypes[info.name], scale=None) for info in reference.layout()}
    planned = []
    for number, wanted in enumerate(recipe.edits):
        try:
            probe = find_file(wanted.probe, folders(recipe))
            planned.append(plan_edit(wanted, edits.get(wanted.edit), probe, tensors, reference.config))
        except MergebenchError as error:
            where = recipe.where("edits", number)
            place = "" if recipe.path is None else f"{where}: edits.{number}: "
            raise type(error)(f"{place}{error.message}", error.hint) from None
    return replace(plan, merge=replace(plan.merge, edits=tuple(planned)))


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
    if verify and not plan.merge.reference.config:
        what = f"--verify needs a config.json, and none goes along with '{plan.merge.reference.reference}'"
        raise RecipeError(what, "leave it out, or name a directory that has one")

    def finish(directory: Path, provenance: dict[str, Any]) -> None:
        write_atomically(directory / "README.md", card.text(target, provenance))
        if verify:
            card.verify(directory)

    def change(staging: Staging) -> dict[str, Any]:
        from mergebench.editing.carry_out import carry_out

        source = plan.merge.reference if plan.merge.copies else None
        return {"edits": carry_out(plan.merge.edits, staging, source)} if plan.merge.edits else {}

    return run_plan(
        plan,
        target,
        resume=resume,
        overwrite=overwrite,
        sync=sync,
        hash_inputs=hash_inputs,
        progress=progress,
        finish=finish,
        change=change,
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
        for one in stage.recipe.edits:
            find_file(one.probe, folders(stage.recipe))
        for i, entry in enumerate(stage.recipe.models):
            if entry.task_vector is not None:
                open_named(stage.recipe, entry.task_vector, ("models", i, "task_vector"), task_vector=True)


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


def plan_fold(
    base: str,
    adapter: str | Path,
    *,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    shard_size: int = SHARD_SIZE,
) -> Plan:
    """A LoRA directory folded into its base: the plan of the recipe that passes BASE+ADAPTER through.

    `ModelError` where the adapter is of a type whose work is no difference of the base's weights.
    """
    read = read_stored(adapter)
    if read.kind != "LORA":
        other = "PEFT's merge_and_unload() folds what can be" if read.is_directory else "no weights do what it does"
        raise ModelError(f"{adapter}: an adapter of type {read.kind} is not folded, only LoRA is", other)
    if open_model(base).adapter is not None:
        raise RecipeError(f"--base: '{base}' has an adapter on top", "fold that one first, and name what comes out")
    recipe = load({"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]})
    return plan(recipe, memory=memory, workers=workers, shard_size=shard_size)


__all__ = ["Result", "check_stages", "default_out", "plan", "plan_fold", "run", "task_vector"]
