"""HRA (Yuan et al., arXiv:2405.17484): a weight's rows, reflected at r planes one after the other.

    W' = W (I - 2 u_1 u_1') .. (I - 2 u_r u_r') = W - (W U) T U',  T = (N + I / 2)^-1

u_i are columns of U with norm 1, N is the part of U' U above the diagonal. If the planes are made orthogonal first
(Gram-Schmidt), T = 2 I. The change has rank r: it is the LoRA of B = -W U and A = T U'.
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
class Planes:
    """normals [columns, r] of any length."""

    normals: Tensor
    orthogonal: bool = False  # made orthogonal first
    a: Tensor | None = None  # T U'; computed, not stored


def _factors(p: Planes) -> tuple[Tensor, Tensor]:
    """U [columns, r] and T U' [r, columns]."""
    if p.orthogonal:
        u: Tensor = torch.linalg.qr(p.normals)[0]
        return u, 2 * u.T
    u = p.normals / torch.linalg.vector_norm(p.normals, dim=0)
    wide = u.double()
    above = (wide.T @ wide).triu(1) + torch.eye(u.shape[1], dtype=torch.float64, device=u.device) / 2
    return u, torch.linalg.solve_triangular(above, wide.T, upper=True).to(u.dtype)


def _prepare(p: Planes, base: Source, shape: tuple[int, ...]) -> Planes:
    u, a = _factors(p)
    return Planes(u, p.orthogonal, a)


def _exact(p: Planes, base: Source, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """-W U and T U'."""
    u, a = _factors(p)
    return torch.cat([-(values @ u) for _, values in each_tile(base, shape, u.device)]), a


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    normals, columns = shapes["normals"], matrix_shape(shape)[1]
    if len(normals) != 2:
        raise ValueError(f"normals {list(normals)} are no vectors")
    if normals[0] != columns:
        raise Misfit(f"planes of {normals[0]} columns")
    if settings["orthogonal"] and normals[1] > columns:
        raise ValueError(f"{normals[1]} planes of {columns} columns cannot be orthogonal")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    normals = torch.randn(columns, min(columns, 4), generator=random)
    return {"normals": normals, "orthogonal": rows == 23}


def _made(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    """U and T U', also in float64."""
    return 24 * math.prod(shapes["normals"]) + 8 * shapes["normals"][1] ** 2


@delta_kind(
    paper="arXiv:2405.17484",
    needs_base=True,
    prepare=_prepare,
    factors=_exact,
    made=_made,
    check=_check,
    example=_example,
    label=lambda parts, settings: f"rank {parts['normals'].shape[1]}",
)
def reflected(p: Planes, tile: slice, base: Tensor | None) -> Tensor:
    """-(W U) T U': HRA, rows reflected at planes."""
    assert base is not None
    u, a = _factors(p) if p.a is None else (p.normals, p.a)
    return -(base @ u) @ a
