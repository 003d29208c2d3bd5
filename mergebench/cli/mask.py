"""`mergebench mask`: which elements a sparse fine-tune may change, and what two masks share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergebench.cli import complete
from mergebench.cli import options as opt
from mergebench.cli.help import App
from mergebench.cli.output import count_bar, note, say_json, say_out
from mergebench.errors import counted, human

app = App(help="Masks for sparse fine-tunes (PaFi), shared by many tasks.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The base: a directory, BASE+ADAPTER or org/name.")]
Smallest = Annotated[
    str,
    typer.Option(metavar="SHARE", help="Share of elements to choose, those with the smallest values: .5%, or 0.005."),
]
Out = Annotated[Path, typer.Option(metavar="FILE", help="The mask to write, MASK.safetensors.")]
Scope = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="model: one ranking over all tensors; tensor: one in each.",
        autocompletion=complete.words("model", "tensor"),
    ),
]


@app.command("magnitude")
def magnitude(
    model: Model,
    smallest: Smallest,
    out: Out,
    scope: Scope = "model",
    include: opt.Include = None,
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write the mask of the elements with the smallest magnitudes.

    Example: mergebench mask magnitude BASE --smallest 0.5% --out mask.safetensors
    """
    _make(model, smallest, out, None, scope, include, overwrite, json_, quiet)


@app.command("fisher")
def fisher(
    model: Model,
    from_: Annotated[str, typer.Option("--from", metavar="FILE", help="Fisher values under the model's tensor names.")],
    smallest: Smallest,
    out: Out,
    scope: Scope = "model",
    include: opt.Include = None,
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write the mask of the elements with the smallest Fisher values, mean squared gradients from a file.

    Example: mergebench mask fisher BASE --from fisher.safetensors --smallest 0.5% --out mask.safetensors
    """
    _make(model, smallest, out, from_, scope, include, overwrite, json_, quiet)


def _make(
    model: str,
    smallest: str,
    out: Path,
    fisher: str | None,
    scope: str,
    include: list[str] | None,
    overwrite: bool,
    json_: bool,
    quiet: bool,
) -> None:
    from mergebench.systems.pafi import make_mask

    share = opt.parse_share(smallest, "--smallest")
    how: dict[str, Any] = {"share": share, "fisher": fisher, "scope": scope, "include": include or ()}
    with count_bar("ranking", quiet or json_) as progress:
        made = make_mask(model, out, **how, overwrite=overwrite, progress=progress)
    size = human(out.stat().st_size)
    chosen = f"{made.chosen:,} of {made.numel:,} elements in {counted(len(made.counts), 'tensor')}"
    note(f"{chosen}, {size}, {made.seconds:.1f} s", quiet or json_)
    say_out(made.out, made._asdict() | {"out": str(made.out)}, json_)


@app.command("overlap")
def overlap(
    a: Annotated[Path, typer.Argument(metavar="A", help="A mask file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another mask of the same model.")],
    json_: opt.Json = False,
) -> None:
    """Show how many positions two masks share, and how many random masks of these sizes would.

    Example: mergebench mask overlap one.safetensors other.safetensors
    """
    from mergebench.systems.pafi import overlap

    everything, by_tensor = overlap(a, b)
    if json_:
        documents = {name: {**one._asdict(), "jaccard": one.jaccard} for name, one in by_tensor.items()}
        total = {**everything._asdict(), "jaccard": everything.jaccard}
        say_json({"a": str(a), "b": str(b), "all": total, "tensors": documents})
        return
    from rich.table import Column, Table

    from mergebench.cli.output import print_table

    numbers = [Column(head, justify="right") for head in ("a", "b", "both", "of random masks", "Jaccard")]
    table = Table("tensor", *numbers, box=None, header_style="bold")
    for name, one in {**by_tensor, "all": everything}.items():
        table.add_row(name, f"{one.a:,}", f"{one.b:,}", f"{one.both:,}", f"{one.expected:,.1f}", f"{one.jaccard:.4f}")
    print_table(table)
