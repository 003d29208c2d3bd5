"""VeRA (arXiv:2310.11454) and PVeRA (arXiv:2512.07703): two random matrices for all layers, scaled by trained vectors.

    W' = W + diag(l) B diag(d) A

B and A are cut out of the first rows and columns of the shared ones; l [out] and d [r] are the layer's. PVeRA's change
is that of the mean, which has the first half of the rows of the shared A. Shared matrices that no file holds are drawn
again from the seed: first A, then B, both uniform between -sqrt(6 / columns) and sqrt(6 / columns).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import matrix_shape
from mergebench.checkpoint.kind import Misfit, delta_kind
from mergebench.deltas import low_rank


@dataclass(frozen=True)
class Shared:
    """l [out], d [r]; the shared B [>= out, r] and A [>= r, >= in], or what to draw them from."""

    outputs: Tensor
    ranks: Tensor
    inputs: int
    b: Tensor | None = None
    a: Tensor | None = None
    columns: bool = False  # outputs are columns of the stored tensor
    seed: int = 0
    drawn_ranks: int = 0  # rows of the A to be drawn
    drawn_inputs: int = 0
    drawn_outputs: int = 0


def factors(p: Shared) -> tuple[Tensor, Tensor]:
    """B and A of this layer, with the vectors multiplied into them."""
    b, a = (p.b, p.a) if p.b is not None and p.a is not None else _draw(p)
    b = p.outputs[:, None] * b[: len(p.outputs)]
    a = p.ranks[:, None] * a[: len(p.ranks), : p.inputs]
    return (a.T, b.T) if p.columns else (b, a)


def _draw(p: Shared) -> tuple[Tensor, Tensor]:
    """B and A from the seed."""
    random = torch.Generator().manual_seed(p.seed)
    a = _uniform(p.drawn_ranks, p.drawn_inputs, random)
    b = _uniform(p.drawn_outputs, len(p.ranks), random)
    return b.to(p.ranks.device), a.to(p.ranks.device)


def _uniform(rows: int, columns: int, random: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))  # rounded as in training
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=random)


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    out, inner = matrix_shape(shape)[:: -1 if settings["columns"] else 1]
    if shapes["outputs"] != (out,) or settings["inputs"] != inner:
        raise Misfit(f"vectors of {list(shapes['outputs'])} outputs and {settings['inputs']} inputs")
    if len(shapes["ranks"]) != 1:
        raise ValueError(f"ranks {list(shapes['ranks'])}")
    rank = shapes["ranks"][0]
    b = shapes.get("b", (settings["drawn_outputs"], rank))
    a = shapes.get("a", (settings["drawn_ranks"], settings["drawn_inputs"]))
    if len(b) != 2 or len(a) != 2 or b[0] < out or b[1] != rank or a[0] < rank or a[1] < inner:
        raise ValueError(f"no factors of rank {rank} of {[out, inner]} in the shared {list(b)} and {list(a)}")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    turned = columns == 1
    out, inner = (columns, rows) if turned else (rows, columns)
    parts: dict[str, Any] = {
        "outputs": torch.randn(out, generator=random),
        "ranks": torch.randn(3, generator=random),
        "inputs": inner,
        "columns": turned,
    }
    if rows == 1:
        return parts | {"seed": 5, "drawn_ranks": 6, "drawn_inputs": inner, "drawn_outputs": out + 1}
    b, a = torch.randn(out + 2, 3, generator=random), torch.randn(3, inner + 1, generator=random)
    return parts | {"b": b, "a": a}


@delta_kind(
    paper="arXiv:2310.11454",
    check=_check,
    example=_example,
    **low_rank.made_by(factors, lambda shapes, settings: shapes["ranks"][0]),
)
def shared_factors(p: Shared, tile: slice, base: Tensor | None) -> Tensor:
    """diag(l) B diag(d) A of shared B and A: VeRA, PVeRA."""
    return low_rank.rows(p, tile, factors)
