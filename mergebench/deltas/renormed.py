"""DoRA's norms (Liu et al., arXiv:2402.09353) by themselves: trained norms, whatever changed the direction before.

    W' = m W / |W|        (eq. 5, of a W that other deltas have changed already)

The norms are those of rows, or with `columns` those of groups of as many columns, over all rows: of an input of a
linear layer, or of a convolution's with its kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import Source, each_tile, matrix_shape, tile_bytes
from mergebench.checkpoint.kind import Misfit, delta_kind


@dataclass(frozen=True)
class Renormed:
    """magnitude m [rows], or [columns / columns of a group]."""

    magnitude: Tensor
    columns: int = 0  # of a group; 0: the norms are those of rows
    norms: Tensor | None = None  # of the groups of columns; computed, not stored


def _norms(p: Renormed, base: Source, shape: tuple[int, ...]) -> Renormed:
    """Read W once if the norms are those of columns."""
    if not p.columns:
        return p
    squares = torch.zeros(matrix_shape(shape)[1], dtype=torch.float64, device=p.magnitude.device)
    for _, values in each_tile(base, shape, p.magnitude.device):
        squares += values.double().square().sum(0)
    return replace(p, norms=squares.view(-1, p.columns).sum(1).sqrt().float())


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    rows, columns = matrix_shape(shape)
    group, found = settings["columns"], shapes["magnitude"]
    if found != (rows if not group else columns // group,) or (group and columns % group):
        raise Misfit(f"{list(found)} norms")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    group = 0 if rows == 1 else 2 if columns % 2 == 0 else 1
    return {"magnitude": 1 + torch.rand(columns // group if group else rows, generator=random), "columns": group}


@delta_kind(
    paper="arXiv:2402.09353",
    needs_base=True,
    prepare=_norms,
    made=lambda shapes, settings, shape: 2 * tile_bytes(shape) + 12 * matrix_shape(shape)[1],
    check=_check,
    example=_example,
)
def renormed(p: Renormed, tile: slice, base: Tensor | None) -> Tensor:
    """m W / |W| - W: the norms of DoRA."""
    assert base is not None
    if p.columns:
        assert p.norms is not None
        return base * (p.magnitude / p.norms).repeat_interleave(p.columns) - base
    factors: Tensor = p.magnitude[tile] / torch.linalg.vector_norm(base, dim=1)
    return base * factors[:, None] - base
