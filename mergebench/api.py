"""Plan and run merges, edits and patches, as the command line and Python users call it.

plan = plan_edit("org/model", "probe.safetensors", rows="4.65%", step=0.75)
run(plan, "edited")                                        # beside the model, edited/patch.safetensors
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench.checkpoint import adopt
from mergebench.checkpoint.files import write_atomically
from mergebench.checkpoint.model import VECTOR, module_at
from mergebench.checkpoint.reference import locate_delta
from mergebench.checkpoint.staging import Staging
from mergebench.deltas.formats import format_of, peft_types
from mergebench.deltas.open import no_format, open_model
from mergebench.deltas.peft.foreign import refuse_foreign_file
from mergebench.deltas.peft.refused import why_refused
from mergebench.editing.patches import open_patch
from mergebench.engine.cluster import join
from mergebench.engine.job import Merge
from mergebench.engine.machine import no_collection, settled
from mergebench.engine.method import Method
from mergebench.engine.plan import DEFAULT_MEMORY, SHARD_SIZE, Plan, plan_merge
from mergebench.engine.run import Result as Result
from mergebench.engine.run import run_plan
from mergebench.errors import ModelError, RecipeError
from mergebench.methods import get as get_method
from mergebench.recipe import Recipe, load
from mergebench.recipe.edited import with_edits
from mergebench.recipe.resolve import resolve

if TYPE_CHECKING:
    from mergebench.evaluation.search.auto import Auto


def plan(
    recipe: Recipe | str | PathLike[str] | Mapping[str, Any],
    *,
    method: Method | None = None,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    device: str = "auto",
    shard_size: int = SHARD_SIZE,
    chunk: int | None = None,
    on: str | None = None,
) -> Plan:
    """Plan a recipe's merge from headers alone; raises if anything does not fit.

    recipe: what `load` returns, or takes. method: a function made with `@merge_method`, in place of the method that a
    recipe's file or mapping names. memory: bytes for buffers and statistics. workers: processes or threads (None: one
    per core). device: auto, cpu, cuda or cuda:N. shard_size: bytes of an output file. chunk: elements, for tests;
    results do not depend on it. on: `ray` or `ray://HOST:PORT`, a cluster: `memory` of each machine, `workers` of all.
    """
    if not isinstance(recipe, Recipe):
        recipe = load(recipe, method=method)
    elif method is not None:
        raise RecipeError("method: this recipe was checked for its own", "load it for another: load(..., method=...)")
    how: Any = {"memory": memory, "workers": workers, "device": device, "shard_size": shard_size, "chunk": chunk}
    how["cluster"] = () if on is None else join(on, workers)
    with no_collection():
        merge = resolve(recipe)
        if merge.data:
            from mergebench.systems.on_data.prepare import with_data  # this import loads transformers

            merge = with_data(merge, recipe)
        return with_edits(plan_merge(merge, **how), recipe)


def prepare(plan: Plan, out: str | Path, **how: Any) -> Plan:
    """The plan once its models have run over their `data:`; how: resume, overwrite, progress (texts done, of all)."""
    if not plan.merge.data:
        return plan
    from mergebench.systems.on_data.prepare import prepare as make  # this import loads transformers

    return make(plan, Path(out), **how)


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

    resume: continue an interrupted run. overwrite: replace an earlier result. sync: fsync (for power cuts).
    hash_inputs: record full hashes of the inputs. verify: load the result on `meta`. progress: called with the number
    of bytes just read, perhaps from several threads.
    """
    target = Path(out)
    plan = prepare(plan, target, resume=resume, overwrite=overwrite)
    if verify and plan.merge.method.gives == "deltas":
        what = f"--verify: '{plan.merge.method.name}' writes no model that transformers loads"
        raise RecipeError(what, "leave it out; BASE+OUT/tasks/NAME with merge_method: passthrough is one")
    if verify:
        from mergebench.networks.verify import check_known  # this import loads transformers

        check_known(plan.merge.reference)

    def finish(directory: Path, provenance: dict[str, Any]) -> None:
        if "task_vector" not in plan.merge.recipe:
            from mergebench.evaluation.page import card  # planning does not wait for it

            write_atomically(directory / "README.md", card.text(target, provenance, directory=directory))
        if verify:
            from mergebench.networks.verify import verify as check

            check(directory)

    def change(staging: Staging) -> dict[str, Any]:
        from mergebench.editing.apply import carry_out

        source = plan.merge.reference if plan.merge.copies else None
        return {"edits": carry_out(plan.merge.edits, staging, source)} if plan.merge.edits else {}

    with settled():
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


def merge(
    recipe: Recipe | str | PathLike[str] | Mapping[str, Any],
    out: str | Path,
    *,
    method: Method | None = None,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    device: str = "auto",
    on: str | None = None,
    **how: Any,
) -> Result:
    """Merge a recipe into the directory `out`: `run(plan(recipe, ...), out, **how)`."""
    return run(plan(recipe, method=method, memory=memory, workers=workers, device=device, on=on), out, **how)


def auto(
    base: str,
    models: Sequence[str] = (),
    suite: str | PathLike[str] | None = None,
    *,
    edit: str | Path | None = None,
    out: str | Path = "auto",
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    **how: Any,
) -> Auto:
    """Merge models without a recipe: a handful of methods are tried on the suite's validation tasks, and the chosen
    merge is measured on its test tasks and written. Or, with a file of labelled texts `edit`, edit the model `base`.

    out: the directory of what is written: `model/`, the checkpoint with its card and page; `best.yaml`, its recipe;
    `search.json`, every candidate. suite: with `edit`, its first validation task is the behaviour (None: what a probe
    sees of it). how: `on`, `results`, `searched` and `progress`, as of `mergebench.search`.

    Raises `RecipeError` for a suite without validation tasks, fewer than two models, or texts of one class.
    """
    from mergebench.evaluation.search import auto as merges
    from mergebench.evaluation.search import auto_edit as edits

    limits: Any = {"memory": memory, "workers": workers, "device": device}
    ways: Any = {**limits, **how, "out": out, "resume": resume, "overwrite": overwrite}
    given = (base, models, suite)
    found = merges.choose_merge(*given, **ways) if edit is None else edits.choose_edit(*given, edit, **ways)
    run(plan(found.recipe, **limits), found.model, resume=resume, overwrite=found.model.exists())
    merges.show(found)
    return found


def task_vector(model: str, base: str, out: str | Path, *, dtype: str = "float32", overwrite: bool = False) -> Result:
    """Write `model` minus `base` as a checkpoint that a recipe can name with `task_vector:`."""
    return run(plan_task_vector(model, base, dtype=dtype), out, overwrite=overwrite)


def plan_task_vector(
    model: str,
    base: str,
    *,
    dtype: str = "float32",
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    shard_size: int = SHARD_SIZE,
) -> Plan:
    """Plan to write `model` minus `base`, stored as `dtype`."""
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
    planned = plan_merge(merge, memory=memory, workers=workers, shard_size=shard_size)
    return replace(planned, shards=[replace(shard, metadata=VECTOR) for shard in planned.shards])


def plan_fold(
    base: str,
    adapter: str | Path,
    *,
    as_trained: str | None = None,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    shard_size: int = SHARD_SIZE,
) -> Plan:
    """Plan to fold an adapter into its base: the recipe that passes BASE+ADAPTER through.

    as_trained: `nf4` rounds the base first, as QLoRA's training saw it; else the base is taken as it is. Raises
    `ModelError` if the adapter's type cannot be written as a difference of the base's weights.
    """
    place = locate_delta(adapter)
    if format_of(place) is None:
        from mergebench.adapters.stored import read_stored

        refuse_foreign_file(place)
        if module_at(place) is not None:
            raise no_format(place)
        read = read_stored(place)
        why = why_refused(read.kind) if read.is_directory else None
        if why is not None:
            raise ModelError(f"{adapter}: {why}")
        other = "PEFT's merge_and_unload() folds what can be" if read.is_directory else "no weights do what it does"
        raise ModelError(f"{adapter}: an adapter of type {read.kind} is not folded, only {peft_types()}", other)
    model = {"model": f"{base}+{adapter}"} | ({} if as_trained is None else {"as_trained": as_trained})
    recipe = load({"merge_method": "passthrough", "models": [model]})
    return plan(recipe, memory=memory, workers=workers, shard_size=shard_size)


def plan_edit(
    model: str,
    probe: str | Path,
    *,
    edit: str = "surgery",
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    shard_size: int = SHARD_SIZE,
    **how: Any,
) -> Plan:
    """Plan a copy of a model with an edit, checked by headers alone.

    how: direction, target, layers, and the edit's own parameters (of surgery: rows, step or alpha, select, op, seed),
    as in a recipe's `edits:`; None counts as not given.
    """
    given = {key: value for key, value in how.items() if value is not None}
    try:
        recipe = load(_copy(model) | {"edits": [{"edit": edit, "probe": str(probe), **given}]})
    except RecipeError as error:  # there is no recipe that a user could look into
        raise RecipeError(error.message.removeprefix("recipe: edits.0."), error.hint) from None
    return with_edits(_plan_copy(recipe, memory, workers, shard_size), recipe)


def plan_patch(
    model: str,
    patch: str | Path,
    *,
    revert: bool = False,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    shard_size: int = SHARD_SIZE,
) -> Plan:
    """Plan a copy of a model with a patch applied, or with `revert` undone, tensor for tensor.

    `ModelError` if the model's rows are not the patch's original rows (with `revert`: its new rows).
    """
    from mergebench.editing.apply import PutIn

    plan, put_in = _plan_copy(load(_copy(model)), memory, workers, shard_size), PutIn(open_patch(patch), revert)
    put_in.check(plan.merge.reference)
    return replace(plan, merge=replace(plan.merge, edits=(put_in,)))


def dry_run(plan: Plan, progress: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Report what a plan by `plan_edit` would change, from one read of the candidates; nothing is written. The report
    has the form of `edits` in mergebench.json."""
    from mergebench.editing.plan import Planned
    from mergebench.editing.scan import scan

    (planned,) = plan.merge.edits
    assert isinstance(planned, Planned)
    report = scan(planned, plan.merge.reference, progress).report()
    return report | {"warnings": planned.doubts(plan.merge.reference) + report["warnings"]}


def _copy(model: str) -> dict[str, Any]:
    """The recipe of a copy."""
    return {"merge_method": "passthrough", "models": [{"model": model}]}


def _plan_copy(recipe: Recipe, memory: int, workers: int | None, shard_size: int) -> Plan:
    """The plan of a copy: bytes are copied unchanged, except in tensors that an adapter changes."""
    merge = resolve(recipe)
    changed = tuple(glob.escape(name) for name in merge.reference.deltas)
    merge = replace(merge, include=changed, exclude=() if changed else ("*",), copies=True)
    return plan_merge(merge, memory=memory, workers=workers, shard_size=shard_size, device="cpu")
