"""OSF (arXiv:2504.07097): the small singular directions of a weight are replaced, the large ones stay.

    W' = U_k S_k V_k' + U diag(S) V        (U_k S_k V_k': the k largest of W)

U [rows, m], S [m], V [m, columns] with m = min(rows, columns) - k. What stays is W projected on the k first singular
vectors of its shorter side, the eigenvectors of W W' or W' W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import Source, each_tile, matrix_shape
from mergebench.checkpoint.kind import Misfit, delta_kind


@dataclass(frozen=True)
class Truncated:
    """U [rows, m], S [m], V [m, columns]."""

    u: Tensor
    s: Tensor
    v: Tensor
    kept_u: Tensor | None = None  # the factors of what stays, [rows, k] and [k, columns]; computed, not stored
    kept_v: Tensor | None = None


def _kept(weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of a matrix by rank k."""
    wide = weight.double()
    if wide.shape[0] > wide.shape[1]:
        right = torch.linalg.eigh(wide.T @ wide)[1].flip(1)[:, :k]  # eigenvalues ascend
        return (wide @ right).to(weight.dtype), right.T.to(weight.dtype)
    left = torch.linalg.eigh(wide @ wide.T)[1].flip(1)[:, :k]
    return left.to(weight.dtype), (left.T @ wide).to(weight.dtype)


def _prepare(p: Truncated, base: Source, shape: tuple[int, ...]) -> Truncated:
    """Read all of W for its singular vectors."""
    weight = torch.cat([values for _, values in each_tile(base, shape, p.u.device)])
    return Truncated(p.u, p.s, p.v, *_kept(weight, min(weight.shape) - len(p.s)))


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    u, s, v, (rows, columns) = shapes["u"], shapes["s"], shapes["v"], matrix_shape(shape)
    if len(u) != 2 or len(s) != 1 or len(v) != 2 or not u[1] == s[0] == v[0]:
        raise ValueError(f"{list(u)}, {list(s)} and {list(v)} do not multiply")
    if (u[0], v[1]) != (rows, columns) or s[0] > min(rows, columns):
        raise Misfit(f"{s[0]} singular directions of {[u[0], v[1]]}")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    m = -(-min(rows, columns) // 2)
    u, v = torch.randn(rows, m, generator=random), torch.randn(m, columns, generator=random)
    return {"u": u, "s": torch.rand(m, generator=random), "v": v}


@delta_kind(
    paper="arXiv:2504.07097",
    needs_base=True,
    prepare=_prepare,
    made=lambda shapes, settings, shape: 16 * math.prod(shape) + 24 * min(matrix_shape(shape)) ** 2,
    folds=lambda p, tile, base: _folded(p, tile),
    check=_check,
    example=_example,
    label=lambda parts, settings: f"rank {parts['s'].shape[0]}",
)
def truncated(p: Truncated, tile: slice, base: Tensor | None) -> Tensor:
    """U_k S_k V_k' + U diag(S) V - W: OSF; unprepared, the tile must be all of W."""
    assert base is not None
    if p.kept_u is not None and p.kept_v is not None:
        return _folded(p, tile) - base
    kept_u, kept_v = _kept(base, min(base.shape) - len(p.s))
    return kept_u @ kept_v + (p.u * p.s)[tile] @ p.v - base


def _folded(p: Truncated, tile: slice) -> Tensor:
    assert p.kept_u is not None and p.kept_v is not None
    return p.kept_u[tile] @ p.kept_v + (p.u[tile] * p.s) @ p.v
