"""`mergebench side`: the network that LST trains beside a base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergebench.cli import complete
from mergebench.cli import options as opt
from mergebench.cli.help import App
from mergebench.cli.output import count_bar, note, say_left, say_out, was_there

app = App(help="Side networks (LST): a base's most important rows and columns.", no_args_is_help=True)


@app.callback()
def _group() -> None: ...


@app.command("init", was="--base")
def init(
    base: Annotated[str, typer.Argument(metavar="MODEL", help="The base: a directory, BASE+DELTA or org/name.")],
    out: opt.Out,
    reduction: Annotated[float, typer.Option(metavar="TIMES", help="How many times narrower.")] = 8.0,
    importance: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="magnitude, or fisher on the items of --data.",
            autocompletion=complete.words("magnitude", "fisher"),
        ),
    ] = "magnitude",
    basis: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="chain: each layer reads what the one before it wrote, as LST's; shared: one for all.",
            autocompletion=complete.words("chain", "shared"),
        ),
    ] = "chain",
    keep_layers: Annotated[
        list[int] | None, typer.Option(metavar="N", help="A block to keep, counted from 0. Repeatable. Default: all.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="For fisher: JSON lines of text and label, of a language model prompt and completion."
        ),
    ] = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a narrow sub-network of a base as a checkpoint: where a ladder (LST) begins.

    Example: mergebench side init BASE --reduction 8 --out side
    """
    from mergebench.systems import lst

    quiet = quiet or json_
    with count_bar("pruning", quiet) as progress:
        result = lst.side_init(
            base,
            out,
            reduction=reduction,
            importance=importance,
            basis=basis,
            keep_layers=keep_layers or (),
            data=data,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    made = result.provenance
    if not was_there(result.already_done, out, quiet):
        say_left(made, quiet)
        width = " -> ".join(map(str, made["width"]))
        what = f"{made['parameters']:,} of {made['of']:,} numbers, width {width}, heads {made['heads']}"
        note(f"wrote {out} in {made['seconds']:.1f} s: {what}", quiet)
    say_out(result.out, made, json_)
