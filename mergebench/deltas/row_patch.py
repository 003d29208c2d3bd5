"""Model surgery (arXiv:2407.08770): one direction, added to some rows by a separate amount for each row.

Rows are neurons' vectors. torch's Linear stores them as rows [..., neurons, width]; GPT-2's Conv1D, and experts of some
mixtures, as columns [..., width, neurons]. If the first dimension is experts, the number of a neuron is expert *
neurons + neuron.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import Source
from mergebench.checkpoint.kind import Misfit, delta_kind
from mergebench.checkpoint.parts import Indices


@dataclass(frozen=True)
class Patch:
    """direction [width], rows int64 [k] ascending, amount [k]."""

    direction: Tensor
    rows: Indices
    amount: Tensor
    columns: int = 0  # 0: neurons are rows; else neurons are columns, and this is their number per expert


def _energy(p: Patch, shape: tuple[int, ...]) -> float:
    """|amounts|^2 |direction|^2, in float64."""
    return float(p.amount.double().square().sum() * p.direction.double().square().sum())


def _factors(p: Patch, base: Source, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """An outer product, because there is one direction; None for experts in one tensor."""
    if len(shape) != 2:
        return None
    amounts = torch.zeros(shape[1 if p.columns else 0])
    amounts[p.rows] = p.amount
    return (p.direction[:, None], amounts[None]) if p.columns else (amounts[:, None], p.direction[None])


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    direction, rows = shapes["direction"], shapes["rows"]
    if len(direction) != 1 or len(rows) != 1 or shapes["amount"] != rows:
        raise ValueError(f"rows {list(rows)}, amounts {list(shapes['amount'])} and direction {list(direction)}")
    check_vectors((*rows, *direction), settings["columns"], shape)


def check_vectors(vectors: tuple[int, ...], columns: int, shape: tuple[int, ...]) -> None:
    """`Misfit` if vectors [k, width] do not fit a tensor of this shape."""
    count, width = vectors
    if len(shape) not in (2, 3) or (shape[-2:] != (width, columns) if columns else shape[-1:] != (width,)):
        raise Misfit(f"the patch changes {count} vectors of {width} elements")


def check_rows(rows: Tensor, width: int, shape: tuple[int, ...]) -> None:
    """Check that neurons are ascending and exist."""
    if not len(rows) or (rows.diff() <= 0).any() or rows[0] < 0:
        raise ValueError("the rows are not in order")
    if rows[-1] >= math.prod(shape) // width:
        raise Misfit(f"the patch changes {len(rows)} vectors of {width} elements")


def some_rows(shape: tuple[int, ...]) -> tuple[Tensor, int, int]:
    """Every other neuron, the width, and `columns`, as a start for examples of kinds on neurons."""
    turned = shape[0] > shape[1]
    width, count = shape if turned else shape[::-1]
    return torch.arange(0, count, 2), width, count if turned else 0


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, width, columns = some_rows(shape)
    direction, amount = torch.randn(width, generator=random), torch.randn(len(rows), generator=random)
    return {"direction": direction, "rows": rows, "amount": amount, "columns": columns}


@delta_kind(
    paper="arXiv:2407.08770",
    energy=_energy,
    factors=_factors,
    example=_example,
    check=_check,
    validate=lambda p, shape: check_rows(p.rows, len(p.direction), shape),
    label=lambda parts, settings: f"{parts['rows'].numel} neurons",
)
def row_patch(p: Patch, tile: slice, base: Tensor | None) -> Tensor:
    """amount_i * direction for each changed neuron i."""
    width, height = len(p.direction), tile.stop - tile.start
    # unchanged elements add -0.0, which changes no bit; adding 0.0 would turn -0.0 into 0.0
    out = torch.full((height, p.columns or width), -0.0, dtype=p.direction.dtype, device=p.direction.device)
    for chosen, coordinates, where in neurons_in(tile, p.rows, width, p.columns):
        vectors = p.amount[chosen, None] * p.direction[coordinates]
        out[where] = vectors.T if p.columns else vectors
    return out


def neurons_in(
    tile: slice, rows: Tensor, width: int, columns: int
) -> Iterator[tuple[slice, slice, tuple[slice | Tensor, ...]]]:
    """For the neurons in a tile: (places among `rows`, coordinates of the vectors, index into the tile)."""
    if not columns:
        chosen = _between(rows, tile.start, tile.stop)
        yield chosen, slice(None), (rows[chosen] - tile.start,)
        return
    first = tile.start
    while first < tile.stop:  # coordinates of one expert after the other
        expert, coordinate = divmod(first, width)
        stop = min(tile.stop, (expert + 1) * width)
        chosen = _between(rows, expert * columns, (expert + 1) * columns)
        where = slice(first - tile.start, stop - tile.start), rows[chosen] - expert * columns
        yield chosen, slice(coordinate, coordinate + stop - first), where
        first = stop


def _between(rows: Tensor, first: int, stop: int) -> slice:
    """The places of the rows numbered `first` to `stop`."""
    low, high = torch.searchsorted(rows, torch.tensor([first, stop], device=rows.device)).tolist()
    return slice(low, high)
