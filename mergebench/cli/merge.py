"""`mergebench merge`; what it shares with `plan` and `explain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import edit, evaluate
from mergebench.cli import options as opt
from mergebench.cli.output import byte_bar, count_bar, counted, item_bar, note, say_json, say_left, say_out, was_there
from mergebench.errors import RecipeError, human

if TYPE_CHECKING:
    from mergebench.engine.plan import Plan
    from mergebench.engine.run import Result
    from mergebench.recipe import Stage

_HELP = "A YAML file (a mergekit config is one), the directory of a result, or - for stdin."
Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help=_HELP)]


def load(recipe: Path, set_: list[str] | None, seed: int | None, out: Path | None = None) -> list[Stage]:
    """The recipes of a file, in the order to merge them; usually one."""
    from mergebench.recipe import load_stages

    return load_stages(recipe, out, set_ or (), seed)


def say_notes(plan: Plan, quiet: bool) -> None:
    for line in plan.merge.notes:
        note(f"note: {line}", quiet)


def say_changes(plan: Plan, quiet: bool) -> None:
    """What share of their bases the models' deltas change, with a warning if it is next to nothing."""
    from mergebench.adapters.share import changed_share, warning
    from mergebench.adapters.share import say as in_words

    merge = plan.merge
    changed = {model.reference: model for model in (merge.reference, *merge.models) if model.deltas}
    for name, model in changed.items() if not quiet else ():
        shares = changed_share(model)
        doubt = warning(shares)
        note(f"{name} {in_words(shares)}")
        note(f"warning: {name} {doubt}", quiet=doubt is None)


def merge(
    recipe: Recipe,
    place: Annotated[Path | None, typer.Argument(metavar="OUT", help="The same as --out, as in mergekit.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output directory. Default: merged/ and the recipe's name.")
    ] = None,
    device: opt.Device = "auto",
    memory: opt.Memory = "400MB",
    workers: opt.Workers = None,
    on: opt.On = None,
    set_: opt.Set = None,
    seed: opt.Seed = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Skip the recipe's evaluation.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also load the result with transformers, without data.")
    ] = False,
    hash_: Annotated[bool, typer.Option("--hash", help="Record full hashes of the input files.")] = False,
    sync: Annotated[bool, typer.Option("--sync", help="fsync the output, against power cuts.")] = False,
    shard_size: opt.ShardSize = "4GB",
    results: opt.Results = Path("results"),
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Merge the models of a RECIPE into one checkpoint, and evaluate it where the recipe says how.

    Example: mergebench merge recipes/quickstart.yaml --out merged/quickstart
    """
    from mergebench import api
    from mergebench.engine.cluster import join
    from mergebench.evaluation import Results, document_of, measure, save
    from mergebench.recipe.stages import check_stages

    quiet = quiet or json_
    if place is not None and out is not None:
        raise RecipeError(f"'{place}' and --out {out}: two output directories", "leave one out")
    note(f"joining the cluster: {on}", quiet or on is None)
    stages = load(recipe, set_, seed, out or place)
    *earlier, last = stages
    loaded, target = last.recipe, last.out
    name = target.resolve().name  # the result may replace the working directory
    limits: dict[str, Any] = {
        "memory": opt.parse_size(memory, "--memory"),
        "workers": workers,
        "device": opt.check_device(device),
        "shard_size": opt.parse_size(shard_size, "--shard-size"),
        "on": on,
    }
    ways = {"resume": resume, "overwrite": overwrite, "sync": sync, "hash_inputs": hash_, "verify": verify}
    suite = measure.read_suite(loaded) if loaded.evaluate is not None and not no_eval else None
    if earlier:
        check_stages(stages, resume=resume, overwrite=overwrite)
    before = [_run_stage(stage, limits, ways, quiet) for stage in earlier]
    plan = api.plan(loaded, **limits)
    say_notes(plan, quiet)
    say_changes(plan, quiet)
    note(f"{plan.merge.method.name}: {_summary(plan)}", quiet)
    if plan.merge.data:
        with count_bar("running the models", quiet) as done:
            plan = api.prepare(plan, target, resume=resume, overwrite=overwrite, progress=done)
    with byte_bar("merging", plan.bytes_read, quiet, _sweeps(plan)) as progress:
        result = api.run(plan, target, **ways, progress=progress)
    _say_done(result, quiet)
    found, measured = None, result.already_done and (target / "evaluation.json").exists()
    if suite is not None and not measured:
        with item_bar("evaluating", quiet) as step:
            how: Any = {"device": device, "results": results, "progress": step}
            how["cluster"] = () if on is None else join(on, models=True)
            found = measure.evaluate(loaded, target, suite=suite, **how)
    elif suite is not None:
        found = Results.load(target)
        measured = (target / "report.html").exists()  # the last file
        if not measured:  # the run was killed before it
            save(found, target)
            measure.show(loaded, target, found)
    if json_:
        document: dict[str, Any] = {"out": str(result.out), **result.provenance}
        if earlier:
            document["earlier_stages"] = before
        if found is not None:
            document["evaluation"] = document_of(found)
        say_json(document)
    elif found is not None and measured:
        evaluate.say_tables(found)
    elif found is not None:
        evaluate.say_results(found, target, results, json_, quiet)
    else:
        say_out(result.out, {}, json_)
    _say_publishing(result, name, quiet)
    if found is not None:
        evaluate.check(found)


def _say_publishing(result: Result, name: str, quiet: bool) -> None:
    """The commands that upload the model; a task vector is none."""
    from mergebench.checkpoint.card import publishing

    if not result.already_done and not result.provenance.get("tasks"):
        create, upload = publishing(name, result.out)
        note(f"to publish it: {create}", quiet)
        note(f"               {upload}", quiet)


def _run_stage(stage: Stage, limits: dict[str, Any], ways: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """Merge a stage that a later stage needs, and report it in one line."""
    from mergebench import api

    plan = api.plan(stage.recipe, **limits)
    say_notes(plan, quiet)
    with byte_bar(f"merging {stage.name}", plan.bytes_read, quiet, _sweeps(plan)) as progress:
        result = api.run(plan, stage.out, **ways, progress=progress)
    done = "already finished" if result.already_done else f"wrote it in {result.provenance['seconds']:.1f} s"
    say_left(result.provenance, quiet or result.already_done)
    note(f"stage {stage.name}: {result.out}: {done}", quiet)
    return {"name": stage.name, "out": str(result.out), **result.provenance}


def _sweeps(plan: Plan) -> list[tuple[str, int]]:
    """The sweeps in their order, for the progress display, with the bytes that each reads; nothing of a single one."""
    found = []
    for number, group in enumerate(plan.groups, 1):
        asked = {name: plan.sweeps_to_ask(name) for name in group.written if name in plan.asked}
        most = max(asked.values(), default=0)
        part = f"part {number} of {len(plan.groups)}, " if len(plan.groups) > 1 else ""
        for sweep in range(most):
            size = sum(plan.sweep_bytes(name, apply=False) for name, count in asked.items() if sweep < count)
            found.append((f"{part}sweep {sweep + 1} of {most + 1}", size))
        copied = sum(plan.merge.reference.tensors[name].nbytes for name in group.written if name in plan.copied)
        size = copied + sum(plan.sweep_bytes(name, apply=True) for name in asked)
        found.append((f"{part}sweep {most + 1} of {most + 1}", size))
    return found if plan.sweeps > 1 else []


def _summary(plan: Plan) -> str:
    from mergebench.recipe.open import models_of

    return (
        f"{counted(len(models_of(plan.merge.recipe)), 'model')}, {plan.elements / 1e6:.1f} M elements, "
        f"{counted(plan.sweeps, 'sweep')}, {human(plan.bytes_read)} to read"
    )


def _say_done(result: Result, quiet: bool) -> None:
    if was_there(result.already_done, result.out, quiet):
        return
    rounding = result.provenance.get("rounding")
    if rounding is not None:
        errors = ", ".join(f"{kind} {one['relative_error']:.2%}" for kind, one in rounding["by_kind"].items())
        note(f"rounded to {rounding['to']}, by |W - Q(W)| / |W|: {errors}", quiet)
    kept = ", ".join(f"{model} {share:.2%}" for model, share in result.provenance["kept"].items())
    note(f"kept at or above the thresholds: {kept}", quiet or not kept)
    lines = result.provenance.get("lines")
    if lines is not None:
        first, last = lines["alpha"], lines["alpha"] + lines["beta"]
        note(f"lines: layers scaled by {first:.4g} (the first, and outside) to {last:.4g} (the last)", quiet)
    tasks = result.provenance.get("tasks")
    if tasks is not None:
        factors = ", ".join(f"{task} {scale:.4g}" for task, scale in tasks.items())
        base = result.provenance["recipe"]["base_model"]
        note(f"tasks and their factors: {factors}; a model is {base}+{result.out}/tasks/{next(iter(tasks))}", quiet)
    edit.say_edits(result.provenance, result.out, quiet)
    say_left(result.provenance, quiet)
    seconds, peak = result.provenance["seconds"], result.provenance["peak_memory"] / 1e6
    note(f"wrote {result.out} in {seconds:.1f} s, peak memory {peak:.0f} MB", quiet)
