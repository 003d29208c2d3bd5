"""`mergebench merge` and `mergebench plan`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import options as opt
from mergebench.cli.progress import byte_bar, human, item_bar, note

if TYPE_CHECKING:
    from mergebench.engine.plan import Plan
    from mergebench.engine.run import Result

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; a mergekit config is a valid recipe.")]


def merge(
    recipe: Recipe,
    out: Annotated[Path | None, typer.Option(help="Output directory. Default: merged/<recipe stem>.")] = None,
    device: opt.Device = "auto",
    memory: opt.Memory = "400MiB",
    workers: opt.Workers = None,
    set_: opt.Set = None,
    seed: opt.Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run left.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Skip the recipe's evaluation.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also load the result with transformers, without data.")
    ] = False,
    hash_: Annotated[bool, typer.Option("--hash", help="Record full hashes of the input files.")] = False,
    sync: Annotated[bool, typer.Option("--sync", help="fsync the output, against power cuts.")] = False,
    shard_size: opt.ShardSize = "4GB",
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Merge the models of a RECIPE into one checkpoint, and evaluate it where the recipe says how."""
    from mergebench import api
    from mergebench.recipe import load

    loaded = load(recipe, set_ or (), seed)
    quiet = quiet or json_
    for line in loaded.notes:
        note(f"note: {line}", quiet)
    device = opt.check_device(device)
    plan = api.plan(
        loaded,
        memory=opt.parse_size(memory, "--memory"),
        workers=workers,
        device=device,
        shard_size=opt.parse_size(shard_size, "--shard-size"),
    )
    target = out or api.default_out(loaded)
    suite = api.read_suite(loaded) if loaded.evaluate is not None and not no_eval else None
    note(f"{plan.merge.method.name}: {_summary(plan)}", quiet)
    with byte_bar("merging", plan.bytes_read, quiet) as progress:
        result = api.run(
            plan,
            target,
            resume=resume,
            overwrite=overwrite,
            sync=sync,
            hash_inputs=hash_,
            verify=verify,
            progress=progress,
        )
    _say_done(result, quiet)
    results = None
    missing = not (target / "evaluation.json").exists()
    if suite is not None and (missing or not result.already_done):
        with item_bar("evaluating", quiet) as step:
            results = api.evaluate(loaded, target, suite=suite, device=device, progress=step)
    if json_:
        document: dict[str, Any] = {"out": str(result.out), **result.provenance}
        if results is not None:
            document["evaluation"] = results.to_dict()
        typer.echo(json.dumps(document))
    elif results is not None:
        from mergebench.evaluation import report

        typer.echo(report(results, styled=sys.stdout.isatty()))
    else:
        typer.echo(str(result.out))


def plan(
    recipe: Recipe,
    device: opt.Device = "auto",
    memory: opt.Memory = "400MiB",
    workers: opt.Workers = None,
    set_: opt.Set = None,
    seed: opt.Seed = None,
    shard_size: opt.ShardSize = "4GB",
    json_: opt.Json = False,
) -> None:
    """Show what a merge would read, ask, write and need, from headers alone."""
    from mergebench import api
    from mergebench.engine.plan import Mismatch
    from mergebench.recipe import load

    loaded = load(recipe, set_ or (), seed)
    for line in loaded.notes:
        note(f"note: {line}", json_)
    try:
        found = api.plan(
            loaded,
            memory=opt.parse_size(memory, "--memory"),
            workers=workers,
            device=opt.check_device(device),
            shard_size=opt.parse_size(shard_size, "--shard-size"),
        )
    except Mismatch as error:
        for line in error.problems:
            note(line)
        count = len(error.problems)
        raise Mismatch([f"{count} mismatch{'es' * (count > 1)}"]) from None
    out = api.default_out(loaded)
    facts = _facts(found, out)
    if json_:
        typer.echo(json.dumps(facts))
        return
    typer.echo(f"{found.merge.method.name} ({found.merge.method.paper}), scope {found.merge.scope}")
    typer.echo(f"  base      {found.merge.base.reference if found.merge.base else 'none'}")
    for number, model in enumerate(found.merge.models):
        zeros = found.zero_share(number)
        extra = f"  task vector exactly zero on {zeros:.1%} of the elements" if zeros else ""
        typer.echo(f"  model     {model.reference}{extra}")
    typer.echo(f"  merged    {facts['merged_tensors']} tensors, {found.elements / 1e6:.2f} M elements")
    typer.echo(f"  copied    {facts['copied_tensors']} tensors from the base")
    typer.echo(f"  passes    {found.passes} question{'s' * (found.passes != 1)}, {found.sweeps} sweeps")
    typer.echo(f"  read      {human(found.bytes_read)}")
    files = f"{len(found.shards)} file{'s' * (len(found.shards) > 1)}"
    typer.echo(f"  write     {human(found.bytes_written)} in {files} to {out}")
    typer.echo(f"  disk      {human(facts['disk_free'])} free")
    memory_text = f"{found.peak_memory / 2**20:.0f} MiB of {found.memory / 2**20:.0f} MiB"
    typer.echo(f"  memory    {memory_text}, beside about 300 MB for torch")
    typer.echo(f"  workers   {found.workers} on {found.device}")


def _facts(plan: Plan, out: Path) -> dict[str, Any]:
    import shutil

    folder = next(folder for folder in [out, *out.absolute().parents] if folder.exists())
    return {
        "method": plan.merge.method.name,
        "scope": plan.merge.scope,
        "models": [model.reference for model in plan.merge.models],
        "merged_tensors": len(plan.alignment.merged),
        "copied_tensors": len(plan.alignment.copied),
        "elements": plan.elements,
        "passes": plan.passes,
        "sweeps": plan.sweeps,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "files": [shard.file for shard in plan.shards],
        "peak_memory": plan.peak_memory,
        "disk_free": shutil.disk_usage(folder).free,
        "zero_share": [plan.zero_share(number) for number in range(len(plan.merge.models))],
    }


def _summary(plan: Plan) -> str:
    models = len(plan.merge.models)
    return (
        f"{models} model{'s' * (models > 1)}, {plan.elements / 1e6:.1f} M elements, "
        f"{plan.sweeps} sweep{'s' * (plan.sweeps > 1)}, {human(plan.bytes_read)} to read"
    )


def _say_done(result: Result, quiet: bool) -> None:
    if result.already_done:
        note(f"{result.out}: already finished, nothing to resume", quiet)
        return
    kept = ", ".join(f"{model} {share:.2%}" for model, share in result.provenance["kept"].items())
    note(f"kept at or above the thresholds: {kept}", quiet or not kept)
    seconds, peak = result.provenance["seconds"], result.provenance["peak_memory"] / 1e6
    note(f"wrote {result.out} in {seconds:.1f} s, peak memory {peak:.0f} MB", quiet)
