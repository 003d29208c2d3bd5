"""`mergebench diff`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import options as opt
from mergebench.cli.output import count_bar, counted, note, print_table, say, say_json

if TYPE_CHECKING:
    from mergebench.evaluation.weights import Difference


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A model: a directory, BASE+ADAPTER or org/name.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another model of the same architecture.")],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base of both: then their task vectors are compared.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="How many of the most changed tensors to show; 0 for all.")] = 20,
    format_: opt.Format = None,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Compare the weights of two models: norm ratio, cosine, changed share, sign conflict of task vectors.

    Example: mergebench diff A B --base BASE

    What the models answer is compared by mergebench compare A B --suite SUITE.
    """
    from mergebench.evaluation.weights import differences

    form = opt.check_format(format_, json_)
    with count_bar("comparing", quiet or json_) as progress:
        found = differences(a, b, base, progress)
    for name, sizes in found.left_out.items():
        note(f"not compared: {name}: {sizes}", quiet or json_)
    if json_:
        rows, total = list(map(_plain, found.rows)), _plain(found.total)
        del total["tensor"]
        say_json({"a": a, "b": b, "base": base, "tensors": rows, "total": total, "left_out": dict(found.left_out)})
        return
    count, same = counted(len(found.rows), "tensor"), sum(row.changed == 0 for row in found.rows)
    if same == len(found.rows):
        say(f"{count}, all equal")
        return
    from rich.table import Column, Table

    titles = ["|B|/|A|", "cosine", "|B-A|/|A|", "changed"] + (["sign conflict"] if base else [])
    table = Table("tensor", *[Column(title, justify="right") for title in titles], box=None, header_style="bold")
    shown = sorted(found.rows, key=lambda row: -row.relative_distance)[: top or None]
    for row in [*shown, found.total]:
        cells = [f"{row.norm_ratio:.4f}", f"{row.cosine:.4f}", f"{row.relative_distance:.2e}", f"{row.changed:.1%}"]
        table.add_row(row.tensor, *cells, *([f"{row.sign_conflict:.1%}"] if base else []))
    most = f"; the {top} most changed are shown" if len(shown) < len(found.rows) else ""
    print_table(table, form=form)
    if form is None:
        say(f"{count}, {same} equal{most}")
    else:
        note(f"{count}, {same} equal{most}", quiet)


def _plain(row: Difference) -> dict[str, Any]:
    """For JSON, which cannot hold infinity, a ratio to a norm of zero."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row._asdict().items()
    }
