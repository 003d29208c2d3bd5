"""`mergebench edit`: one edit of one model; and saying what any edit did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mergebench.cli import options as opt
from mergebench.cli.output import byte_bar, note
from mergebench.errors import RecipeError

BAR = 40  # characters of the longest bar


def edit(
    model: Annotated[str, typer.Option(help="The model to edit: a directory, BASE+ADAPTER or org/name. Only read.")],
    probe: Annotated[Path, typer.Option(help="A probe, as `mergebench probe fit` writes it.")],
    out: Annotated[Path | None, typer.Option(help="Output directory.")] = None,
    rows: Annotated[
        str | None, typer.Option(help="How many rows: 16384, or a share of the candidates. Default: 4.65%.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="How much of the direction is added. Default: 1.08.")] = None,
    alpha_relative: Annotated[
        bool, typer.Option("--alpha-relative", help="Alpha is the length added, in median norms of the candidates.")
    ] = False,
    direction: Annotated[str | None, typer.Option(help="row1, diff, unit-diff or mean-diff. Default: row1.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Whose rows: a role (gate_proj, up_proj, q_proj ...) or a glob of names.")
    ] = None,
    select: Annotated[str | None, typer.Option(help="min-cos, max-cos or random. Default: min-cos.")] = None,
    op: Annotated[str | None, typer.Option(help="add or subtract. Default: add.")] = None,
    layers: Annotated[str | None, typer.Option(help="all, 0-15, 3,5,7 or !0-7; -1 is the last. Default: all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of --select random.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show which rows it would edit; write nothing.")] = False,
    memory: opt.Memory = "400MiB",
    workers: opt.Workers = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also load the result with transformers, without data.")
    ] = False,
    sync: Annotated[bool, typer.Option("--sync", help="fsync the output, against power cuts.")] = False,
    shard_size: opt.ShardSize = "4GB",
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Edit a MODEL's behaviour: add a probe's direction to the few rows that point away from it (model surgery)."""
    from mergebench import api

    quiet = quiet or json_
    if out is None and not dry_run:
        raise RecipeError("--out: missing", "name a directory for the edited model, or look first: --dry-run")
    plan = api.plan_edit(
        model,
        probe,
        memory=opt.parse_size(memory, "--memory"),
        workers=workers,
        shard_size=opt.parse_size(shard_size, "--shard-size"),
        rows=rows,
        alpha=alpha,
        alpha_relative=alpha_relative or None,
        direction=direction,
        target=target,
        select=select,
        op=op,
        layers=layers,
        seed=seed,
    )
    if dry_run or out is None:
        (planned,) = plan.merge.edits
        with byte_bar("reading", planned.nbytes, quiet) as progress:
            report = api.dry_run(plan, progress)
        if json_:
            typer.echo(json.dumps(report))
        else:
            show(report)
            warn(report, quiet)
        return
    with byte_bar("copying", plan.bytes_read, quiet) as progress:
        result = api.run(plan, out, resume=resume, overwrite=overwrite, sync=sync, verify=verify, progress=progress)
    if result.already_done:
        note(f"{out}: already finished, nothing to resume", quiet)
    else:
        say(result.provenance, out, quiet)
        note(f"wrote {out} in {result.provenance['seconds']:.1f} s", quiet)
    typer.echo(json.dumps({"out": str(result.out), **result.provenance}) if json_ else str(result.out))


def say(provenance: Mapping[str, Any], out: Path, quiet: bool) -> None:
    """What each edit of a result did, and how it is taken back."""
    for report in provenance.get("edits", ()):
        note(sentence(report), quiet)
        note(f"take it back: mergebench patch revert --model {out} --patch {out}/{report['patch']} --out DIR", quiet)
        warn(report, quiet)


def warn(report: Mapping[str, Any], quiet: bool) -> None:
    for line in report["warnings"]:
        note(f"warning: {line}", quiet)


def sentence(report: Mapping[str, Any]) -> str:
    """`surgery: 461 of 46080 rows of gate_proj, 0.20 % of the parameters; step 5.7 median row norms`."""
    step = report["relative_step"]
    length = "" if step is None else f"; step {step:.3g} median row norms"
    rows = f"{report['rows']} of {report['of']} rows of {report['target']}"
    return f"{report['edit']}: {rows}, {report['share']:.2%} of the parameters{length}"


def show(report: Mapping[str, Any]) -> None:
    """What an edit would do, in full."""
    from rich.table import Table

    from mergebench.cli.output import print_table

    typer.echo(sentence(report))
    for line in report["candidates"]:
        typer.echo(f"  {line}")
    cosine, root = report["cosine"], report["width"] ** 0.5
    if not cosine["candidates"]:
        return
    typer.echo(f"  cosines with {report['direction']} of {report['probe']['file']}{_about(report['probe'])}")
    table = Table("", *(f"{name}%" for name in cosine["candidates"]), box=None, header_style="bold")
    for name, factor, digits in (("cosine", 1.0, 4), ("z", root, 2)):
        table.add_row(name, *(f"{value * factor:.{digits}f}" for value in cosine["candidates"].values()))
    print_table(table)
    if "least" in cosine:
        most = f"the edited rows: {cosine['least']:.4f} (z {cosine['least'] * root:.2f}) to"
        typer.echo(f"  {most} {cosine['most']:.4f} (z {cosine['most'] * root:.2f})")
    typer.echo("  rows by layer")
    longest = max(report["by_layer"].values()) or 1
    for layer, count in report["by_layer"].items():
        typer.echo(f"  {layer:>4} {count:>6} {'█' * round(BAR * count / longest)}".rstrip())


def _about(probe: Mapping[str, Any]) -> str:
    """Where the probe was fitted, and how well."""
    if "layer" not in probe:
        return ""
    fitted = f"layer {probe['layer']}, norm {probe.get('norm')}, pool {probe.get('pool')}"
    known = "test_accuracy" in probe and "majority" in probe
    well = f"; {probe['test_accuracy']:.1%} of test texts right, majority {probe['majority']:.1%}" if known else ""
    return f" ({fitted}{well})"
