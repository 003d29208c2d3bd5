"""FourierFT (arXiv:2405.03003): some frequencies of the change.

    W' = W + s Re ifft2(F)        (F [rows, columns]: zeros, and coefficients at places drawn from a seed)

An inverse transform of all rows is one along the columns of F, then one along each row. The first is computed for the
rows of a tile from the coefficients alone, so F is never written out:

    T[i, v] = 1 / rows sum_k c_k exp(2 pi i u_k / rows) [v_k = v],    W'[i] = W[i] + s Re ifft(T[i])
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import Source, matrix_shape, tile_bytes, tile_rows
from mergebench.checkpoint.kind import delta_kind

SMALL = 2**32 // 20  # elements; for larger permutations torch draws other numbers


@dataclass(frozen=True)
class Spectrum:
    """coefficients [k]; the seed of their places in F, or in its transpose."""

    coefficients: Tensor
    seed: int
    scale: float = 1.0
    turned: bool = False  # the tensor is the transpose of what the places are drawn for
    places: Tensor | None = None  # int64 [2, k], rows and columns of F; computed, not stored
    columns: int = 0  # of the tensor; computed, not stored
    roots: Tensor | None = None  # complex [rows]: exp(2 pi i j / rows); computed, not stored


def drawn(count: int, numel: int, seed: int) -> Tensor:
    """The first `count` numbers of torch's random permutation of `numel`: its first exchanges, without the rest."""
    random = torch.Generator().manual_seed(seed)
    if numel >= SMALL:
        return torch.randperm(numel, generator=random)[:count]
    moved: dict[int, int] = {}
    out = []
    for at in range(count):
        # the last draw of a whole permutation has nothing to choose from, and is left out
        other = at + int(torch.randint(numel - at, (), generator=random)) if at < numel - 1 else at
        out.append(moved.get(other, other))
        moved[other] = moved.pop(at, at)
    return torch.tensor(out, dtype=torch.int64)


def drawing(count: int, shape: tuple[int, ...]) -> int:
    """Bytes that `places` needs."""
    return (160 + 32) * count + (8 * math.prod(shape) if math.prod(shape) >= SMALL else 0)


def places(count: int, shape: tuple[int, ...], seed: int, turned: bool) -> Tensor:
    """Rows and columns, int64 [2, count], in the tensor; `turned`: they are drawn for its transpose."""
    rows, columns = matrix_shape(shape)
    width = rows if turned else columns
    flat = drawn(count, rows * columns, seed)
    pairs = torch.stack([flat // width, flat % width])
    return pairs.flip(0) if turned else pairs


def add_at(out: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """The flat `out` with values added at positions, some of which are equal, in the same order every time."""
    if out.is_cuda:  # sorts them; `index_add` is not in order there
        return out.index_put((positions,), values, accumulate=True)
    return out.index_add(0, positions, values)


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """Check that there is a place for each coefficient."""
    (coefficients,) = shapes.values()
    if len(coefficients) != 1 or coefficients[0] > math.prod(shape):
        raise ValueError(f"coefficients {list(coefficients)} of {list(shape)}")


def _prepare(p: Spectrum, base: Source, shape: tuple[int, ...]) -> Spectrum:
    device, (rows, columns) = p.coefficients.device, matrix_shape(shape)
    found = places(len(p.coefficients), shape, p.seed, p.turned)
    angles = 2 * math.pi / rows * torch.arange(rows, dtype=torch.float64)
    roots = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    return replace(p, places=found.to(device), columns=columns, roots=roots.to(device))


def example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    """Coefficients of some places."""
    count = math.prod(shape) // 3 + 1
    return {"coefficients": torch.randn(count, generator=random), "seed": 777, "scale": 2.0, "turned": shape[0] > 1}


def _made(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    """The places, and for a tile the values that the coefficients add to each of its rows, as complex numbers."""
    (count,), rows = shapes["coefficients"], min(tile_rows(shape), matrix_shape(shape)[0])
    return drawing(count, shape) + 32 * rows * count + 4 * tile_bytes(shape) + 24 * matrix_shape(shape)[0]


@delta_kind(
    paper="arXiv:2405.03003",
    prepare=_prepare,
    made=_made,
    check=check,
    example=example,
    label=lambda parts, settings: f"{parts['coefficients'].numel} frequencies",
)
def fourier(p: Spectrum, tile: slice, base: Tensor | None) -> Tensor:
    """s Re ifft2(F), F of some frequencies: FourierFT."""
    assert p.places is not None and p.roots is not None
    rows, columns, (u, v) = len(p.roots), p.columns, p.places
    here = torch.arange(tile.start, tile.stop, device=u.device)[:, None]
    values = p.coefficients / rows * p.roots[here * u % rows]  # [rows of the tile, k]
    at = (here - tile.start) * columns + v
    partial = add_at(values.new_zeros(len(here) * columns), at.ravel(), values.ravel())
    change: Tensor = torch.fft.ifft(partial.view(-1, columns)).real
    return p.scale * change
