"""BOFT (Liu et al., arXiv:2311.06243): a rotation of a weight's input dimensions, a product of sparse ones.

    W' = s * (W R'),  R = M_m .. M_1 M_0,  M_i = P_i diag(R_i1, ..., R_in) P_i'

R_ij [b, b] is the Cayley transform of the skew-symmetric part of a matrix. P_i deals out groups of b 2^i dimensions in
halves of blocks: the even halves first, then the odd ones, so that each factor mixes what the one before it could not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import matrix_shape, tile_bytes
from mergebench.checkpoint.kind import Misfit, delta_kind
from mergebench.deltas.rotated import cayley


@dataclass(frozen=True)
class Butterfly:
    """blocks [factors, n, b, b], factors of output rows [rows, 1]."""

    blocks: Tensor
    factors: Tensor


class _Built(Butterfly):
    """After `prepare`: R_ij - I in the place of `blocks`."""


def _turns(p: Butterfly) -> Tensor:
    """R_ij - I [factors, n, b, b]."""
    return cayley((p.blocks - p.blocks.mT) / 2)


def order(columns: int, half: int, level: int, device: torch.device) -> Tensor:
    """P_i as the dimensions that it takes, in their order; half: b / 2."""
    halves = torch.arange(columns, device=device).view(-1, 2**level, 2, half)
    return halves.transpose(1, 2).reshape(-1)


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    blocks, (rows, columns) = shapes["blocks"], matrix_shape(shape)
    if len(blocks) != 4 or blocks[2] != blocks[3] or blocks[0] == 0:
        raise ValueError(f"{list(blocks)} are no square blocks by factors")
    if blocks[0] > 1 and (blocks[2] % 2 or blocks[1] % 2 ** (blocks[0] - 1)):
        raise ValueError(f"{list(blocks)} make no butterfly")
    if blocks[1] * blocks[2] != columns or shapes["factors"] != (rows, 1):
        raise Misfit(f"{blocks[1]} blocks of {blocks[2]} columns, {list(shapes['factors'])} factors of rows")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    size = {16: 4, 9: 3}.get(columns, columns)
    blocks = torch.randn(3 if columns == 16 else 1, columns // size, size, size, generator=random)
    return {"blocks": 0.5 * blocks, "factors": 1 + torch.rand(rows, 1, generator=random)}


def _made(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    """Q, I + Q, its inverse and R; the tile before, while and after it is rotated."""
    return 20 * math.prod(shapes["blocks"]) + 4 * tile_bytes(shape)


@delta_kind(
    paper="arXiv:2311.06243",
    needs_base=True,
    prepare=lambda p, base, shape: _Built(_turns(p), p.factors),
    made=_made,
    check=_check,
    example=_example,
    label=lambda parts, settings: f"{parts['blocks'].shape[0]} factors, blocks of {parts['blocks'].shape[2]}",
)
def butterfly(p: Butterfly, tile: slice, base: Tensor | None) -> Tensor:
    """s * (W R') - W with R a product of permuted rotated blocks: BOFT."""
    assert base is not None
    turns = p.blocks if isinstance(p, _Built) else _turns(p)
    turned = base
    for level, matrices in enumerate(turns):
        size = matrices.shape[-1]
        taken = order(base.shape[1], size // 2, level, base.device) if level else slice(None)
        # P' puts a dimension where P took it from
        placed = torch.argsort(taken) if isinstance(taken, Tensor) else taken
        blocks = turned[:, placed].view(len(base), -1, size).transpose(0, 1)
        added = (blocks @ matrices.mT).transpose(0, 1).reshape(base.shape)
        turned = turned + added[:, taken]
    return p.factors[tile] * turned - base
