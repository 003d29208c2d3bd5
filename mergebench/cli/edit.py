"""`mergebench edit`: one edit of one model; and printing reports of edits."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import complete
from mergebench.cli import options as opt
from mergebench.cli.declared import OF, DeclaredCommand, option_of
from mergebench.cli.output import byte_bar, note, say, say_json, say_left, say_out, was_there
from mergebench.errors import RecipeError

if TYPE_CHECKING:
    from mergebench.cli.declared import Declared

DEFAULT = "surgery"
BAR = 40  # characters of the longest bar


class EditCommand(DeclaredCommand):
    """The options of the edit that --edit names."""

    def declared(self, args: list[str]) -> Declared:
        from mergebench.editing import edits
        from mergebench.editing.spec import OF_ANY

        edit = edits.get(_named(args))
        of_any = {option_of(name): parameter for name, parameter in OF_ANY.items() if name != "probe"}
        taken = {option for parameter in self.params for option in parameter.opts} | of_any.keys()
        options = {option_of(name): parameter for name, parameter in edit.parameters.items()}
        its_own = {o if o not in taken else option_of(f"{edit.name}_{p.name}"): p for o, p in options.items()}
        return {f"{OF}any edit": of_any, OF + edit.name: its_own}


def _named(args: list[str]) -> str:
    """The value of --edit, read before the options that depend on it are known."""
    name = DEFAULT
    for word, after in pairwise([*args, DEFAULT]):
        name = after if word == "--edit" else word.removeprefix("--edit=") if word.startswith("--edit=") else name
    return name


def edit(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, BASE+ADAPTER or org/name. Only read.")],
    probe: Annotated[Path, typer.Option(metavar="FILE", help="A probe, as `mergebench probe fit` writes it.")],
    edit_: Annotated[
        str,
        typer.Option(
            "--edit",
            metavar="NAME",
            help="Which edit; `mergebench methods` lists them.",
            autocompletion=complete.edits,
        ),
    ] = DEFAULT,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output directory. Required without --dry-run.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show which rows it would edit; write nothing.")] = False,
    memory: opt.Memory = "400MB",
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
    """Edit a MODEL's behaviour: add a probe's direction to the few rows that point away from it (model surgery).

    Example: mergebench edit MODEL --probe probe.safetensors --dry-run

    With --edit NAME another edit, and the options it declares: mergebench edit --edit NAME -h shows them.
    """
    from mergebench import api

    quiet = quiet or json_
    if out is None and not dry_run:
        raise RecipeError("--out: missing", "name a directory for the edited model, or look first: --dry-run")
    plan = api.plan_edit(
        model,
        probe,
        edit=edit_,
        memory=opt.parse_size(memory, "--memory"),
        workers=workers,
        shard_size=opt.parse_size(shard_size, "--shard-size"),
        **ctx.obj,
    )
    if dry_run or out is None:
        (planned,) = plan.merge.edits
        with byte_bar("reading", planned.nbytes, quiet) as progress:
            report = api.dry_run(plan, progress)
        if json_:
            say_json(report)
        else:
            show(report)
            warn(report, quiet)
        return
    with byte_bar("copying", plan.bytes_read, quiet) as progress:
        result = api.run(plan, out, resume=resume, overwrite=overwrite, sync=sync, verify=verify, progress=progress)
    if not was_there(result.already_done, out, quiet):
        say_edits(result.provenance, out, quiet)
        say_left(result.provenance, quiet)
        note(f"wrote {out} in {result.provenance['seconds']:.1f} s", quiet)
    say_out(result.out, result.provenance, json_)


def say_edits(provenance: Mapping[str, Any], out: Path, quiet: bool) -> None:
    """Print what each edit of a result did, and how to revert it."""
    for report in provenance.get("edits", ()):
        note(sentence(report), quiet)
        note(f"take it back: mergebench patch revert {out}/{report['patch']} --model {out} --out DIR", quiet)
        warn(report, quiet)


def warn(report: Mapping[str, Any], quiet: bool) -> None:
    for line in report["warnings"]:
        note(f"warning: {line}", quiet)


def sentence(report: Mapping[str, Any]) -> str:
    """`surgery: 461 of 46080 rows of gate_proj, 0.20% of the parameters; step 5.7 median row norms`."""
    step = report["relative_step"]
    length = "" if step is None else f"; step {step:.3g} median row norms"
    rows = f"{report['rows']} of {report['of']} rows of {report['target']}"
    return f"{report['edit']}: {rows}, {report['share']:.2%} of the parameters{length}"


def show(report: Mapping[str, Any]) -> None:
    """Print the full plan of an edit."""
    from rich.table import Column, Table

    from mergebench.cli.output import print_table

    say(sentence(report))
    for line in report["candidates"]:
        say(f"  {line}")
    cosine, root = report["cosine"], report["width"] ** 0.5
    if not cosine["candidates"]:
        return
    say(f"  cosines with {report['direction']} of {report['probe']['file']}{_about(report['probe'])}")
    heads = [Column(f"{name}%", justify="right") for name in cosine["candidates"]]
    table = Table("", *heads, box=None, header_style="bold")
    for name, factor, digits in (("cosine", 1.0, 4), ("z", root, 2)):
        table.add_row(name, *(f"{value * factor:.{digits}f}" for value in cosine["candidates"].values()))
    print_table(table)
    if "least" in cosine:
        most = f"the edited rows: {cosine['least']:.4f} (z {cosine['least'] * root:.2f}) to"
        say(f"  {most} {cosine['most']:.4f} (z {cosine['most'] * root:.2f})")
    say("  rows by layer")
    longest = max(report["by_layer"].values()) or 1
    for layer, count in report["by_layer"].items():
        place = "emb." if layer == "embeddings" else layer
        say(f"  {place:>4} {count:>6} {'█' * round(BAR * count / longest)}".rstrip())


def _about(probe: Mapping[str, Any]) -> str:
    """The probe's layer and settings, and its test accuracy."""
    if "layer" not in probe:
        return ""
    fitted = f"layer {probe['layer']}, norm {probe.get('norm')}, pool {probe.get('pool')}"
    known = "test_accuracy" in probe and "majority" in probe
    well = f"; {probe['test_accuracy']:.1%} of test texts right, majority {probe['majority']:.1%}" if known else ""
    return f" ({fitted}{well})"
