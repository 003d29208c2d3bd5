"""`mergebench patch`: apply, revert or show the patch of an edit, or write it as a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergebench.cli import options as opt
from mergebench.cli.help import App
from mergebench.cli.output import byte_bar, count_bar, note, say, say_json, say_left, say_out, was_there
from mergebench.errors import counted, human

app = App(help="Put an edit into a model, take it out, show it, make it a LoRA.", no_args_is_help=True)

Patch = Annotated[Path, typer.Argument(metavar="PATCH", help="A file, as `mergebench edit` writes it.")]
Model = Annotated[str, typer.Option(metavar="MODEL", help="A directory, BASE+ADAPTER or org/name. Only read.")]


@app.command("apply", was="--patch")
def apply(
    patch: Patch,
    model: Model,
    out: opt.Out,
    memory: opt.Memory = "400MB",
    workers: opt.Workers = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    shard_size: opt.ShardSize = "4GB",
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write MODEL with the patch: tensor for tensor what the edit gave.

    Example: mergebench patch apply edited/patch.safetensors --model MODEL --out again
    """
    _put_in(False, patch, model, out, memory, workers, resume, overwrite, shard_size, json_, quiet)


@app.command("revert", was="--patch")
def revert(
    patch: Patch,
    model: Model,
    out: opt.Out,
    memory: opt.Memory = "400MB",
    workers: opt.Workers = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    shard_size: opt.ShardSize = "4GB",
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write MODEL without the patch: tensor for tensor what was edited.

    Example: mergebench patch revert edited/patch.safetensors --model edited --out before
    """
    _put_in(True, patch, model, out, memory, workers, resume, overwrite, shard_size, json_, quiet)


def _put_in(
    revert: bool,
    patch: Path,
    model: str,
    out: Path,
    memory: str,
    workers: int | None,
    resume: bool,
    overwrite: bool,
    shard_size: str,
    json_: bool,
    quiet: bool,
) -> None:
    from mergebench import api
    from mergebench.checkpoint.target import check_target

    quiet = quiet or json_
    sizes = {"memory": opt.parse_size(memory, "--memory"), "shard_size": opt.parse_size(shard_size, "--shard-size")}
    plan = api.plan_patch(model, patch, revert=revert, workers=workers, **sizes)
    check_target(out, [patch], overwrite or resume)  # the output to be replaced may hold the patch
    with byte_bar("copying", plan.bytes_read, quiet) as progress:
        result = api.run(plan, out, resume=resume, overwrite=overwrite, progress=progress)
    if not was_there(result.already_done, out, quiet):
        (done,) = result.provenance["edits"]
        what = "taken out of" if revert else "put into"
        say_left(result.provenance, quiet)
        note(f"{_title(done)} {what} {model}: wrote {out} in {result.provenance['seconds']:.1f} s", quiet)
    say_out(result.out, result.provenance, json_)


@app.command("show")
def show(
    patch: Patch,
    json_: opt.Json = False,
) -> None:
    """Show what a patch changes, and what made it.

    Example: mergebench patch show edited/patch.safetensors
    """
    from mergebench.editing.patches import open_patch

    read = open_patch(patch)
    tensors: list[dict[str, Any]] = []
    for name in read.names:
        amounts, original = read.amounts(name), read.deltas.entries[name].orig
        assert original is not None
        least, most = float(amounts.min()), float(amounts.max())
        side = "columns" if read.columns(name) else "rows"
        tensors.append(
            {"name": name, "changed": len(amounts), "side": side, "dtype": original.dtype, "amount": [least, most]}
        )
    length, size = float(read.direction.norm()), patch.stat().st_size
    if json_:
        about = {"patch": str(patch), "width": len(read.direction), "length": length, "bytes": size}
        say_json({**about, "made": dict(read.about), "tensors": tensors})
        return
    from rich.table import Column, Table

    from mergebench.cli.output import print_table

    say(_title(read.about))
    table = Table("tensor", Column("changed", justify="right"), "", "dtype", "amount", box=None, header_style="bold")
    for tensor in tensors:
        least, most = tensor["amount"]
        amount = f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"
        table.add_row(tensor["name"], str(tensor["changed"]), tensor["side"], tensor["dtype"], amount)
    print_table(table)
    changed = sum(tensor["changed"] for tensor in tensors)
    say(
        f"{counted(changed, 'vector')} of {len(read.direction)} elements in {counted(len(tensors), 'tensor')}; "
        f"the direction's length is {length:.4g}; {human(size)}"
    )


def _title(about: Any) -> str:
    """`surgery (rows 4.65%, step 0.75, probe hate.safetensors)`: as much as a patch says."""
    said = about.get("parameters") if isinstance(about.get("parameters"), dict) else {}
    known = [f"{key} {said[key]}" for key in ("rows", "select", "op") if key in said]
    known += [f"{key} {about[key]}" for key in ("direction", "target") if key in about]
    if isinstance(about.get("relative_step"), int | float):
        known.insert(1, f"step {about['relative_step']:.3g}")
    probe = about.get("probe")
    known += [f"probe {probe['file']}"] if isinstance(probe, dict) and "file" in probe else []
    return f"{about.get('edit', 'patch')}" + (f" ({', '.join(known)})" if known else "")


@app.command("to-lora")
def to_lora(
    patch: Patch,
    model: Annotated[str, typer.Option(metavar="MODEL", help="The model that was edited.")],
    out: opt.Out,
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write the patch as a LoRA of rank 1 that PEFT loads: the edit as a switch of a running model.

    Example: mergebench patch to-lora edited/patch.safetensors --model MODEL --out lora
    """
    quiet = quiet or json_
    with count_bar("converting", quiet) as progress:
        from mergebench.adapters.from_patch import patch_to_lora  # this import takes as long as the work

        result = patch_to_lora(model, patch, out, overwrite=overwrite, progress=progress)
    made = result.provenance
    note(f"rank 1, {counted(made['modules'], 'module')}, {made['seconds']:.1f} s", quiet)
    say_out(result.out, made, json_)
