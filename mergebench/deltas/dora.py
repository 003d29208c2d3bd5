"""DoRA (Liu et al., arXiv:2402.09353): a low-rank change of direction, and a trained norm for every output row.

    W' = m (W + s B A) / |W + s B A|        (eq. 5)

The norms are those of output rows. If the tensor is stored [in, out], output rows are columns, and all norms must be
known before the first row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import Source, each_tile, matrix_shape, tile_bytes
from mergebench.checkpoint.kind import Misfit, delta_kind
from mergebench.deltas import low_rank


@dataclass(frozen=True)
class Dora:
    """B [rows, r], A [r, columns], magnitude m [output rows]."""

    b: Tensor
    a: Tensor
    magnitude: Tensor
    scale: float = 1.0
    columns: bool = False  # output rows are columns of the stored tensor
    norms: Tensor | None = None  # of the columns of W + s B A; computed, not stored


def _column_norms(p: Dora, base: Source, shape: tuple[int, ...]) -> Dora:
    """Read W once if output rows are columns."""
    if not p.columns:
        return p
    squares = torch.zeros(matrix_shape(shape)[1], dtype=torch.float64, device=p.b.device)
    for tile, values in each_tile(base, shape, p.b.device):
        squares += _adapted(p, tile, values).double().square().sum(0)
    return replace(p, norms=squares.sqrt().float())


def _adapted(p: Dora, tile: slice, base: Tensor) -> Tensor:
    return base + p.scale * p.b[tile] @ p.a


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    out = matrix_shape(shape)[1 if settings["columns"] else 0]
    if shapes["magnitude"] != (out,):
        raise Misfit(f"magnitude {list(shapes['magnitude'])} is not one norm for each of {out} output rows")
    low_rank.check(shapes, settings, shape)


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    turned = shape[0] > shape[1]
    magnitude = 1 + torch.rand(shape[1 if turned else 0], generator=random)
    return low_rank.some_factors(shape, random) | {"magnitude": magnitude, "columns": turned}


def _made(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    """A tile of W + s B A and its square in float64, of the pass for the norms."""
    return 3 * tile_bytes(shape) + 12 * matrix_shape(shape)[1] if settings["columns"] else tile_bytes(shape)


@delta_kind(
    paper="arXiv:2402.09353",
    needs_base=True,
    prepare=_column_norms,
    made=_made,
    check=_check,
    example=_example,
    label=low_rank.label,
)
def dora(p: Dora, tile: slice, base: Tensor | None) -> Tensor:
    """m (W + s B A) / |W + s B A| - W."""
    assert base is not None
    adapted = _adapted(p, tile, base)
    if p.columns:
        assert p.norms is not None
        return adapted * (p.magnitude / p.norms) - base
    norms = torch.linalg.vector_norm(adapted.detach(), dim=1)  # a constant in training (section 4.3)
    factor: Tensor = p.magnitude[tile] / norms
    return adapted * factor[:, None] - base
