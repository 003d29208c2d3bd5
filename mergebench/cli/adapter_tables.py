"""`mergebench adapters drift` and `inspect`: what is printed of adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mergebench.cli import options as opt
from mergebench.cli.progress import human

_ANY = "PEFT directories of any type, or single .safetensors files as a bank holds them."


def drift(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER ADAPTER...", help=f"In the order of their tasks: {_ANY}")
    ],
    json_: opt.Json = False,
) -> None:
    """Compare the adapters of a sequence: distance from the mean of those before, and cosines, by their tensors."""
    from mergebench.adapters import adapter_drift

    found = adapter_drift(adapters)
    if json_:
        layers = {layer: apart.to_plain() for layer, apart in found.layers.items()}
        about = {"adapters": list(map(str, adapters)), "names": found.names, "kind": found.kind}
        typer.echo(json.dumps({**about, "tensors": found.tensors, **found.total.to_plain(), "layers": layers}))
        return
    numbers = [str(number) for number in range(1, len(found.names) + 1)]
    table = _table("", "adapter", "norm", "drift", *[f"cos {number}" for number in numbers[:-1]])
    for at, (name, norm, moved, cosines) in enumerate(
        zip(found.names, found.total.norms, found.total.drift, found.total.cosines, strict=True)
    ):
        table.add_row(numbers[at], name, _short(norm), _share(moved), *[_share(cosine) for cosine in cosines[:at]])
    table.columns[1].justify = "left"
    _print(table)
    typer.echo()
    table = _table("drift in", *numbers[1:])
    for layer, apart in found.layers.items():
        table.add_row(layer, *[_share(moved) for moved in apart.drift[1:]])
    _print(table)
    typer.echo(
        f"\n{found.tensors} tensors as they are stored ({found.kind}). "
        "Drift: |A - mean of those before| / |A|; cos: of the angle to the others."
    )


def inspect(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help=_ANY)],
    json_: opt.Json = False,
) -> None:
    """Show what adapters are, side by side: type, base, ranks, targets, sizes, norms by layer."""
    from mergebench.adapters import describe_adapter

    found = [describe_adapter(adapter) for adapter in adapters]
    if json_:
        typer.echo(json.dumps([one.to_plain() for one in found]))
        return
    table = _table("", *[one.name for one in found])
    rows: dict[str, list[str]] = {
        "type": [", ".join([one.kind, *one.variants]) for one in found],
        "base": [one.base or "" for one in found],
        "rank": [_range(one.ranks) for one in found],
        "scale": [_range(one.scales) for one in found],
        "targets": ["\n".join(one.targets) for one in found],
        "saved whole": [", ".join(one.saved_whole) for one in found],
        "tensors": [f"{one.tensors} ({', '.join(one.dtypes)})" for one in found],
        "parameters": [f"{one.parameters:,}" for one in found],
        "size": [human(one.bytes) for one in found],
        "norm of": ["scale B A" if one.norm_of == "differences" else "the tensors" for one in found],
        "norm": [_short(one.norm) for one in found],
    }
    for layer in dict.fromkeys(layer for one in found for layer in one.norms):
        rows[f"  {layer}"] = [_short(one.norms.get(layer)) for one in found]
    for title, cells in rows.items():
        if any(cells):
            table.add_row(title, *cells)
    _print(table)


def sequence_text(made: Mapping[str, Any]) -> str:
    """`ema on the stored tensors: 3 adapters, 24 tensors, alpha 0.1`: what `adapters merge` did."""
    count, copied, method = len(made["adapters"]), made["copied"], made["method"]
    adapters = f"{count} {made['kind']} adapter{'s' * (count > 1)}"
    if len(copied) == (count if method["all"] else 1):
        return f"copied: {', '.join(copied)}"
    written = f", all written ({copied[0]} is a copy)" if method["all"] else ""
    tensors = f"{made['tensors']} tensors"
    return f"ema on the stored tensors: {adapters}, {tensors}, alpha {method['alpha']:g}{written}"


def _range(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:g}" for value in (*values[:1], *values[-1:])))


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or not value else f"{value:.2e}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(first: str, *more: str) -> Any:
    from rich.table import Column, Table

    return Table(first, *[Column(title, justify="right") for title in more], box=None, header_style="bold")


def _print(table: Any) -> None:
    from mergebench.cli.inspect import print_table

    print_table(table)
