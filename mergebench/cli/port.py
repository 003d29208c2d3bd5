"""`mergebench port`: carry a fine-tune or an adapter to an updated base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import evaluate
from mergebench.cli import options as opt
from mergebench.cli.merge import say_notes
from mergebench.cli.output import byte_bar, count_bar, item_bar, note, print_table, say, say_json, say_left
from mergebench.errors import RecipeError, counted

if TYPE_CHECKING:
    from mergebench.systems.portllm.check import Check, Sums


def port(
    patch: Annotated[
        str,
        typer.Argument(metavar="TUNED", help="A fine-tune of the old base, or an adapter or delta file made on it."),
    ],
    old: Annotated[str, typer.Option(metavar="MODEL", help="The base it was made on.")],
    new: Annotated[str, typer.Option(metavar="MODEL", help="The updated base.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output directory. Required without --check and --suite.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Write nothing. Report what fits, how far the base moved, and how that relates to the patch.",
        ),
    ] = False,
    suite: Annotated[
        Path | None,
        typer.Option(metavar="SUITE", help="Measure old, tuned, new and ported model on the tasks of a suite."),
    ] = None,
    difference: Annotated[
        bool, typer.Option("--difference", help="For an adapter: write the checkpoint NEW + what it adds to OLD.")
    ] = False,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Tensors to keep from NEW. Repeatable.")
    ] = None,
    split: opt.Split = None,
    device: opt.Device = "auto",
    memory: opt.Memory = "400MB",
    workers: opt.Workers = None,
    shard_size: opt.ShardSize = "4GB",
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    results: opt.Results = Path("results"),
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Carry a fine-tune or an adapter from the base it was made on to an updated base, without training.

    Example: mergebench port LORA --old BASE --new NEWER_BASE --out lora-2
    """
    quiet, excluded = quiet or json_, tuple(exclude or ())
    if check and (out is not None or suite is not None):
        raise RecipeError("--check goes alone: it writes and measures nothing", "leave out --out and --suite")
    if out is None and suite is None and not check:
        raise RecipeError("--out: missing", "name an output directory, or --check, or --suite SUITE")
    opt.check_split(split)
    if check:
        _check(old, new, patch, excluded, json_, quiet)
        return
    limits = {
        "memory": opt.parse_size(memory, "--memory"),
        "workers": workers,
        "shard_size": opt.parse_size(shard_size, "--shard-size"),
    }
    document: dict[str, Any] = {}
    if suite is not None:
        from mergebench.evaluation import load_suite
        from mergebench.evaluation.place import check_place, place_of

        loaded = load_suite(suite).only(split)  # its errors come before the work
        kept = out or place_of(suite, "port-")
        if out is None:
            check_place(kept, loaded, overwrite)
    if out is not None:
        ways = {"resume": resume, "overwrite": overwrite}
        document = _write(old, new, patch, out, difference, excluded, limits, ways, quiet)
    if suite is None:
        say_json(document) if json_ else say(str(out))
        return
    from mergebench.evaluation import document_of, page, save
    from mergebench.systems.portllm import measure_port

    with item_bar("evaluating", quiet) as step:
        found = measure_port(
            old, new, patch, suite, out=out, difference=difference, exclude=excluded, split=split,
            device=opt.check_device(device), results=results, progress=step,
        )  # fmt: skip
    if json_ and out is not None:
        say_json({**document, "evaluation": document_of(found)})
    else:
        kept.mkdir(parents=True, exist_ok=True)
        save(found, kept)
        page.attempt(kept)
        evaluate.say_results(found, kept, results, json_, quiet)
    evaluate.check(found)


def _write(
    old: str,
    new: str,
    patch: str,
    out: Path,
    difference: bool,
    exclude: tuple[str, ...],
    limits: dict[str, Any],
    ways: dict[str, bool],
    quiet: bool,
) -> dict[str, Any]:
    from mergebench.systems.portllm import plan_port
    from mergebench.systems.portllm import port as port_to
    from mergebench.systems.portllm.checkpoint import run_port
    from mergebench.systems.portllm.opened import adapter_at

    if adapter_at(patch) is not None and not difference:
        result = port_to(old, new, patch, out, exclude=exclude, overwrite=ways["overwrite"])
        for line in result.provenance["notes"]:
            note(f"note: {line}", quiet)
        note(f"{new}+{out} changes {counted(result.provenance['tensors'], 'tensor')} of {new}", quiet)
    else:
        plan = plan_port(old, new, patch, exclude=exclude, **limits)
        say_notes(plan, quiet)
        with byte_bar("porting", plan.bytes_read, quiet) as progress:
            result = run_port(plan, out, **ways, progress=progress)
        seconds = result.provenance["seconds"]
        done = "already finished" if result.already_done else f"wrote it in {seconds:.1f} s"
        say_left(result.provenance, quiet or result.already_done)
        note(f"{out}: {counted(result.provenance['merged_tensors'], 'tensor')} ported: {done}", quiet)
    return {"out": str(result.out), **result.provenance}


def _check(old: str, new: str, patch: str, exclude: tuple[str, ...], json_: bool, quiet: bool) -> None:
    from mergebench.systems.portllm import check_port

    with count_bar("reading", quiet) as progress:
        found = check_port(old, new, patch, exclude=exclude, progress=progress)
    if json_:
        say_json(found.to_plain())
    else:
        _show(found)
    if found.problems:
        raise typer.Exit(3)


def _show(found: Check) -> None:
    from rich import box
    from rich.table import Table

    say(f"old     {found.old} ({found.identities['old']})")
    say(f"new     {found.new} ({found.identities['new']})")
    say(f"tokens  {found.tokens}")
    for line in found.notes:
        say(f"note    {line}")
    for line in found.problems:
        say(f"misfit  {line}")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for title in ("update", "patch", "ratio", "cos", "in columns", "chance", "in rows", "chance"):
        table.add_column(title, justify="right")
    for layer, sums in found.layers.items():
        table.add_row(layer, *_cells(sums), end_section=layer == next(reversed(found.layers)))
    table.add_row("all", *_cells(found.total))
    print_table(table)
    full = found.total.to_plain()["in_columns"] is None and found.total.update > 0
    why = " No share in the patch's span: it is not of low rank." if full else ""
    say(
        "update: |new - old| / |old|, patch: |patch| / |old|, ratio: update / patch, cos: between the two; in columns, "
        "in rows: share of |new - old|^2 in the patch's column and row space, chance: of a random update." + why
    )
    whole = "" if found.whole is None else f" The base moved by {_percent(found.whole)} of |old| in all its tensors."
    say(f"{counted(found.tensors, 'tensor')} that the patch changes.{whole}")
    if found.changes is not None:
        say(f"What the adapter adds to NEW is {_percent(found.changes)} off what it adds to OLD.")


def _cells(sums: Sums) -> list[str]:
    found = sums.to_plain()
    ratio, cosine = found["update_to_patch"], found["cosine"]
    return [
        _percent(found["update"]),
        _percent(found["patch"]),
        "" if ratio is None else f"{ratio:.3g}",
        "" if cosine is None else f"{cosine:+.4f}",
        *(_percent(found[key]) for key in ("in_columns", "chance_columns", "in_rows", "chance_rows")),
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g}%"
