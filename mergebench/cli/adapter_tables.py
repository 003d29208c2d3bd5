"""`mergebench adapters drift` and `inspect`: tables about adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mergebench.cli import options as opt
from mergebench.cli.output import say, say_json
from mergebench.errors import RecipeError, counted, human, shown

_ANY = "PEFT directories of any type, org/name, or single .safetensors files as a bank holds them."
MOST = 8  # adapters with a column each: more do not fit a terminal


def drift(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER", help=f"In the order of their tasks: {_ANY}")],
    json_: opt.Json = False,
) -> None:
    """Compare the adapters of a sequence: distance from the mean of those before, and cosines, by their tensors.

    Example: mergebench adapters drift TASK1 TASK2 TASK3
    """
    from mergebench.adapters import adapter_drift

    found = adapter_drift(adapters)
    if json_:
        layers = {layer: apart.to_plain() for layer, apart in found.layers.items()}
        about = {"adapters": list(map(str, adapters)), "names": found.names, "kind": found.kind}
        say_json({**about, "tensors": found.tensors, **found.total.to_plain(), "layers": layers})
        return
    count = len(found.names)
    titles = [f"cos {at + 1}" for at in range(count - 1)] if count <= MOST else ["cos 1", "cos before"]
    table = _table("", "adapter", "norm", "drift", *titles)
    for at, (name, cosines) in enumerate(zip(found.names, found.total.cosines, strict=True)):
        lengths = [_short(found.total.norms[at]), _share(found.total.drift[at])]
        before = cosines[:at] if count <= MOST or not at else [cosines[0], cosines[at - 1]]
        table.add_row(str(at + 1), name, *lengths, *map(_share, before))
    table.columns[1].justify = "left"
    _print(table)
    say()
    last = range(1, count)[-MOST:]
    table = _table("drift in", *[str(at + 1) for at in last])
    for layer, apart in found.layers.items():
        table.add_row(layer, *[_share(apart.drift[at]) for at in last])
    _print(table)
    more = " All of them: --json." * (count > MOST)
    say()
    say(
        f"{counted(found.tensors, 'tensor')} as they are stored ({found.kind}). "
        f"Drift: |A - mean of those before| / |A|; cos: of the angle to the others.{more}"
    )


def inspect(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER", help=_ANY)],
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the rank of each module of one adapter as a PNG.")
    ] = None,
    json_: opt.Json = False,
) -> None:
    """Show what adapters are, side by side: type, base, ranks, targets, sizes, norms by layer.

    Example: mergebench adapters inspect LORA1 LORA2
    """
    from rich.text import Text

    from mergebench.adapters import describe_adapter

    found = [describe_adapter(adapter) for adapter in adapters]
    if plot is not None:
        from mergebench.adapters.rank_map import write_plot

        if len(found) != 1 or not found[0].rank_map:
            raise RecipeError("--plot: of one LoRA or AdaLoRA", "name one adapter whose modules have ranks")
        write_plot(found[0].rank_map, plot, found[0].name)
    if json_:
        say_json([one.to_plain() for one in found])
        return
    table = _table("", *[one.name for one in found])
    rows: dict[str, Sequence[str | Text]] = {
        "type": [", ".join([one.kind, *one.variants]) for one in found],
        "base": [one.base or "" for one in found],
        "rank": [_range(one.ranks) for one in found],
        "scale": [_range(one.scales) for one in found],
        "targets": [Text("\n".join(map(shown, one.targets))) for one in found],
        "saved whole": [", ".join(one.saved_whole) for one in found],
        "tensors": [f"{one.tensors} ({', '.join(one.dtypes)})" for one in found],
        "parameters": [f"{one.parameters:,}" for one in found],
        "size": [human(one.bytes) for one in found],
        "norm of": ["scale B A" if one.norm_of == "differences" else "the tensors" for one in found],
        "norm": [_short(one.norm) for one in found],
        "|A A' - I|": [_short(one.orthogonality) for one in found],
    }
    for layer in dict.fromkeys(layer for one in found for layer in one.norms):
        rows[f"  {layer}"] = [_short(one.norms.get(layer)) for one in found]
    for title, cells in rows.items():
        if any(cells):
            table.add_row(title, *cells)
    _print(table)
    for one in found:
        if len(set(one.rank_map.values())) > 1:
            say()
            say(f"{one.name}: rank of each module")
            _rank_map(one.rank_map)


def sequence_text(made: Mapping[str, Any]) -> str:
    """`ema on the stored tensors: 3 adapters, 24 tensors, alpha 0.1`: what `adapters merge` did."""
    count, copied, method = len(made["adapters"]), made["copied"], made["method"]
    adapters = counted(count, f"{made['kind']} adapter")
    if len(copied) == (count if method["all"] else 1):
        return f"copied: {', '.join(copied)}"
    written = f", all written ({copied[0]} is a copy)" if method["all"] else ""
    tensors = counted(made["tensors"], "tensor")
    return f"ema on the stored tensors: {adapters}, {tensors}, alpha {method['alpha']:g}{written}"


def _range(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:g}" for value in (*values[:1], *values[-1:])))


def _rank_map(ranks: Mapping[str, int]) -> None:
    """The rank of every module: layers down, modules across."""
    from mergebench.adapters.rank_map import grid

    names, cells = grid(ranks)
    table = _table("rank", *names)
    for place, row in cells.items():
        table.add_row(place, *[str(row.get(name, "")) for name in names])
    _print(table)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or not value else f"{value:.2e}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(first: str, *more: str) -> Any:
    from rich.table import Column, Table

    return Table(first, *[Column(title, justify="right") for title in more], box=None, header_style="bold")


def _print(table: Any) -> None:
    from mergebench.cli.output import print_table

    print_table(table)
