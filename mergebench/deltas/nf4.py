"""NF4, the rounding that QLoRA (arXiv:2305.14314, section 3) trains an adapter on: 16 values in each block of a weight.

    W' = s q(W / s)

s is the largest |W| of a block of consecutive elements, q the nearest of 16 quantiles of a normal distribution
(appendix E), the lower one half-way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import Source, matrix_shape
from mergebench.checkpoint.kind import delta_kind

# appendix E, as float32
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_READ = 1 << 20  # elements of a piece in which W is read for the scales


@dataclass(frozen=True)
class Rounded:
    """block: elements that share a scale."""

    block: int = 64
    scales: Tensor | None = None  # by block; computed, not stored


def _largest(values: Tensor, block: int) -> Tensor:
    """The largest absolute value of each block of a flat tensor, of which the last may be short."""
    whole = len(values) // block * block
    scales = values[:whole].view(-1, block).abs().amax(1)
    return scales if whole == len(values) else torch.cat([scales, values[whole:].abs().amax().reshape(1)])


def _prepare(p: Rounded, base: Source, shape: tuple[int, ...]) -> Rounded:
    """Read W once for the scales."""
    rows, columns = matrix_shape(shape)
    step, numel = max(_READ // p.block, 1) * p.block, rows * columns
    scales = []
    for start in range(0, numel, step):
        values = torch.empty(min(step, numel - start))
        base.read(start, values)
        scales.append(_largest(values, p.block))
    return replace(p, scales=torch.cat(scales))


def _fold(p: Rounded, tile: slice, base: Tensor) -> Tensor:
    assert p.scales is not None
    first, stop = tile.start * base.shape[1], tile.stop * base.shape[1]
    blocks = p.scales.to(base)[first // p.block : -(-stop // p.block)]
    scales = blocks.repeat_interleave(p.block)[first % p.block :][: stop - first].view_as(base)
    values = torch.tensor(VALUES, dtype=torch.float32).to(base)
    borders = (values[1:] + values[:-1]) / 2
    within = base * torch.where(scales > 0, 1 / scales, 0)  # a block of zeros stays
    rounded: Tensor = values[torch.bucketize(within, borders)] * scales
    return rounded


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    if settings["block"] < 1:
        raise ValueError(f"a block of {settings['block']} elements")


@delta_kind(
    paper="arXiv:2305.14314",
    needs_base=True,
    folds=_fold,
    prepare=_prepare,
    made=lambda shapes, settings, shape: 8 * (matrix_shape(shape)[0] * matrix_shape(shape)[1] // settings["block"] + 1),
    check=_check,
    example=lambda shape, random: {"block": 16},
)
def nf4(p: Rounded, tile: slice, base: Tensor | None) -> Tensor:
    """s q(W / s) - W: a weight rounded to 4 bits, as QLoRA trains on it; unprepared, the tile must be all of W."""
    assert base is not None
    if p.scales is None:
        p = replace(p, scales=_largest(base.reshape(-1), p.block))
    return _fold(p, tile, base) - base
