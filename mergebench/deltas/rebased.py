"""FRoD (AAAI 2026): a weight in a basis of its inputs that layers share, with a sparse matrix between.

    W = U diag(l) V'  becomes  W' = U (S + diag(lambda)) V'

V [in, in] is stored; U = W V'^-1 with columns of norm 1 is computed from W and this V. S has values at some places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import Source, each_tile, matrix_shape, tile_rows
from mergebench.checkpoint.kind import Misfit, delta_kind
from mergebench.checkpoint.parts import Indices


@dataclass(frozen=True)
class Rebased:
    """V [in, in], lambda [in], values [n] of S at places [2, n]; columns: the tensor is stored [in, out]."""

    basis: Tensor
    scales: Tensor | None
    values: Tensor | None
    places: Indices
    columns: bool = False
    made: Tensor | None = (
        None  # float64; U = W made, or if columns U (S + diag(lambda)) [out, in]; computed, not stored
    )


def _inverse(basis: Tensor) -> Tensor:
    """V'^-1, or its pseudo-inverse, float64."""
    wide = basis.double()
    try:
        inverse: Tensor = torch.linalg.inv(wide)
    except RuntimeError:  # singular
        inverse = torch.linalg.pinv(wide, rtol=1e-6)
    return inverse.T


def _normed(inverse: Tensor, squares: Tensor) -> Tensor:
    """The inverse with which U has columns of norm 1; columns that W does not have are zero."""
    norms = squares.sqrt()
    return inverse * torch.where(norms > 1e-12, 1 / norms, 0)


def _turned(p: Rebased, u: Tensor) -> Tensor:
    """U (S + diag(lambda))."""
    assert p.scales is not None and p.values is not None
    rows, columns = p.places
    return (u * p.scales.double()).index_add(1, columns, u[:, rows] * p.values.double())


def _prepare(p: Rebased, base: Source, shape: tuple[int, ...]) -> Rebased:
    """Read W once for the norms of U, or if it is stored [in, out] for U itself."""
    inverse, (rows, columns) = _inverse(p.basis), matrix_shape(shape)
    if p.columns:
        u = inverse.new_zeros(columns, rows)
        for tile, values in each_tile(base, shape, inverse.device):
            u += values.double().T @ inverse[tile]
        return replace(p, scales=None, values=None, made=_turned(p, _normed(u, u.square().sum(0))))
    squares = inverse.new_zeros(columns)
    for _, values in each_tile(base, shape, inverse.device):
        squares += (values.double() @ inverse).square().sum(0)
    return replace(p, made=_normed(inverse, squares))


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    basis, inner = shapes["basis"], matrix_shape(shape)[0 if settings["columns"] else 1]
    if len(shapes["values"]) != 1 or shapes["places"] != (2, *shapes["values"]):
        raise ValueError(f"{list(shapes['values'])} values at places {list(shapes['places'])}")
    if basis != (inner, inner) or shapes["scales"] != (inner,):
        raise Misfit(f"a basis {list(basis)} of inputs with {list(shapes['scales'])} scales")


def _validate(p: Rebased, shape: tuple[int, ...]) -> None:
    if p.places.numel() and not 0 <= int(p.places.min()) <= int(p.places.max()) < len(p.basis):
        raise ValueError(f"places beyond {len(p.basis)} inputs")


def _made(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    """V and its inverses in float64, the columns of U that S takes, and U if it is kept."""
    rows = matrix_shape(shape)[1] if settings["columns"] else tile_rows(shape)
    taken = 16 * rows * math.prod(shapes["values"])
    return 24 * math.prod(shapes["basis"]) + taken + (24 * math.prod(shape) if settings["columns"] else 0)


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    turned = rows in (1, 24)
    inner = rows if turned else columns
    basis = 2 * torch.eye(inner) + 0.3 * torch.randn(inner, inner, generator=random)
    places = torch.randint(inner, (2, 5), generator=random)
    scales, values = torch.randn(inner, generator=random), torch.randn(5, generator=random)
    return {"basis": basis, "scales": scales, "values": values, "places": places, "columns": turned}


@delta_kind(
    paper="doi:10.1609/aaai.v40i31.39813",
    needs_base=True,
    prepare=_prepare,
    made=_made,
    check=_check,
    validate=_validate,
    example=_example,
)
def rebased(p: Rebased, tile: slice, base: Tensor | None) -> Tensor:
    """U (S + diag(lambda)) V' - W: FRoD; unprepared, the tile must be all of W."""
    assert base is not None
    basis, made = p.basis.double(), p.made
    if p.columns:
        if made is None:
            u = base.double().T @ _inverse(p.basis)
            made = _turned(p, _normed(u, u.square().sum(0)))
        return (basis[tile] @ made.T - base).to(base.dtype)
    if made is None:
        inverse = _inverse(p.basis)
        made = _normed(inverse, (base.double() @ inverse).square().sum(0))
    return (_turned(p, base.double() @ made) @ basis.T - base).to(base.dtype)
