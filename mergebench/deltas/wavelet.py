"""WaveFT (arXiv:2505.12532): some wavelet coefficients of the change.

    W' = W + s idwt2(F)        (F: zeros, and coefficients at places drawn from a seed)

One level of the transform. The quarters of F are four bands, its top left the coarse one. In the right half a
coefficient stands for a wavelet along the outputs (elsewhere for the scaling function), in the lower half for one along
the inputs. Each changes L x L elements, where L is the length of the filter; F has L - 2 more rows and columns than W,
half of them before, so that no element at the edge misses one. Without a wavelet the change is s F itself.

The filters of Daubechies' wavelets dbN and the near-symmetric symN are the factors of one polynomial: of each root and
its inverse a filter has one (Daubechies, Ten Lectures on Wavelets, 1992, chapters 6 and 8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergebench.checkpoint.delta import Source, matrix_shape, tile_rows
from mergebench.checkpoint.kind import delta_kind
from mergebench.deltas import fourier
from mergebench.deltas.fourier import add_at, places

# For symN, which roots are taken outside the unit circle, by ascending magnitude.
_OUTSIDE = {
    "sym2": "0", "sym3": "0", "sym4": "01", "sym5": "10", "sym6": "101", "sym7": "100", "sym8": "0101", "sym9": "0110",
    "sym10": "10101",
}  # fmt: skip
WAVELETS = (*(f"db{n}" for n in range(1, 11)), *_OUTSIDE)


@cache
def filters(wavelet: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The low-pass and the high-pass filter of a reconstruction."""
    order = int(wavelet[2 if wavelet.startswith("db") else 3 :])
    y = np.roots([math.comb(order - 1 + k, k) for k in reversed(range(order))])  # of P, sin^2(w / 2) is y
    middle = 1 - 2 * y + 0j
    z = middle + np.sqrt(middle**2 - 1)  # z + 1 / z = 2 - 4 y
    z = np.where(abs(z) < 1, z, 1 / z)
    low = np.ones(1)
    for _ in range(order):
        low = np.convolve(low, [1, 1])
    roots = sorted((root for root in z if root.imag > -1e-9), key=abs)  # one of two that are conjugate
    for root, outside in zip(roots, _OUTSIDE.get(wavelet, "0" * order), strict=False):
        root = 1 / root if outside == "1" else root
        real = abs(root.imag) < 1e-9
        low = np.convolve(low, [1, -root.real] if real else [1, -2 * root.real, abs(root) ** 2])
    low *= math.sqrt(2) / low.sum()
    high = low[::-1] * (-1.0) ** np.arange(len(low))
    return tuple(low.tolist()), tuple(high.tolist())


@dataclass(frozen=True)
class Coefficients:
    """coefficients [k]; the seed of their places, in the tensor's shape or in its transpose; the wavelet's name."""

    coefficients: Tensor
    seed: int
    wavelet: str = ""
    scale: float = 1.0
    turned: bool = False  # the tensor is [in, out]
    first: Tensor | None = None  # int64 [2, k]: the first row, ascending, and column that each changes; computed
    taps: Tensor | None = None  # [2, k, L]: filters along the rows and the columns; computed
    columns: int = 0  # of the tensor; computed


def _prepare(p: Coefficients, base: Source, shape: tuple[int, ...]) -> Coefficients:
    sizes, found = matrix_shape(shape), places(len(p.coefficients), shape, p.seed, p.turned)
    if not p.wavelet:
        first, taps = found, torch.ones(2, len(p.coefficients), 1)
    else:
        bank = torch.tensor(filters(p.wavelet))
        more = bank.shape[1] - 2
        halves = [(size + more + 1) // 2 for size in sizes]
        at = [place + (2 * half - size) // 2 for place, half, size in zip(found, halves, sizes, strict=True)]
        first = torch.stack([2 * (place % half) - more for place, half in zip(at, halves, strict=True)])
        band = [(place >= half).long() for place, half in zip(at, halves, strict=True)]
        taps = torch.stack([bank[band[1]], bank[band[0]]])  # along an axis by the half across it
    order = first[0].argsort(stable=True)
    device = p.coefficients.device
    return replace(
        p,
        coefficients=p.coefficients[order.to(device)],
        first=first[:, order].to(device),
        taps=taps[:, order].to(device),
        columns=sizes[1],
    )


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    fourier.check(shapes, settings, shape)
    if settings["wavelet"] and settings["wavelet"] not in WAVELETS:
        raise ValueError(f"wavelet {settings['wavelet']}: only db1 to db10 and sym2 to sym10 are known")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    return fourier.example(shape, random) | {"wavelet": "sym4" if shape[0] > 1 else ""}


def _made(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    """Filters and places of the coefficients; of those that a tile meets, every element that they change."""
    (count,), (rows, _) = shapes["coefficients"], matrix_shape(shape)
    length = len(filters(settings["wavelet"])[0]) if settings["wavelet"] else 1
    met = min(1.0, (tile_rows(shape) + length) / max(rows, 1))
    return fourier.drawing(count, shape) + count * (64 + 16 * length) + int(40 * met * count * length**2)


@delta_kind(
    paper="arXiv:2505.12532",
    prepare=_prepare,
    made=_made,
    check=_check,
    example=_example,
    label=lambda parts, settings: f"{settings['wavelet']} {parts['coefficients'].numel} coefficients".lstrip(),
)
def wavelet(p: Coefficients, tile: slice, base: Tensor | None) -> Tensor:
    """s idwt2(F), F of some coefficients: WaveFT."""
    assert p.first is not None and p.taps is not None
    length, device = p.taps.shape[2], p.first.device
    ends = torch.tensor([tile.start - length + 1, tile.stop], device=device)
    low, high = torch.searchsorted(p.first[0], ends).tolist()
    rows, columns = p.first[:, low:high, None] + torch.arange(length, device=device)  # [k, L] each
    down, across = p.taps[:, low:high]
    values = (p.scale * p.coefficients[low:high, None] * down)[:, :, None] * across[:, None]
    at = (rows[:, :, None] - tile.start) * p.columns + columns[:, None]
    inside = ((rows >= tile.start) & (rows < tile.stop))[:, :, None] & ((columns >= 0) & (columns < p.columns))[:, None]
    # adding -0.0 changes no bit
    out = torch.full(((tile.stop - tile.start) * p.columns,), -0.0, dtype=values.dtype, device=device)
    return add_at(out, at[inside], values[inside]).view(-1, p.columns)
