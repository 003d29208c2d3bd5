"""C3A (arXiv:2407.19342): blocks, each a circulant matrix.

    W' = W + C / in,    C[m b + i, n b + j] = kernel[m, n, (j - i) mod b]

The tensor is [out, in]. A block's product with a vector is a circular convolution, which PEFT computes by FFTs.
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


@dataclass(frozen=True)
class Circulant:
    """kernel [out / b, in / b, b]."""

    kernel: Tensor


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    kernel = shapes["kernel"]
    if len(kernel) != 3:
        raise ValueError(f"kernels {list(kernel)}")
    made = (kernel[0] * kernel[2], kernel[1] * kernel[2])
    if made != matrix_shape(shape):
        raise Misfit(f"the kernels make {list(made)}")


def _energy(p: Circulant, shape: tuple[int, ...]) -> float:
    """Each number stands b times in its block."""
    return float(p.kernel.double().square().sum()) * p.kernel.shape[2] / matrix_shape(shape)[1] ** 2


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    size = math.gcd(rows, columns)
    return {"kernel": torch.randn(rows // size, columns // size, size, generator=random)}


def _made(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    """The kernels' places in a tile, and its blocks before they are put side by side."""
    return 2 * tile_bytes(shape)


@delta_kind(
    paper="arXiv:2407.19342",
    energy=_energy,
    made=_made,
    check=_check,
    example=_example,
    label=lambda parts, settings: f"block {parts['kernel'].shape[2]}",
)
def circulant(p: Circulant, tile: slice, base: Tensor | None) -> Tensor:
    """C / in, C of circulant blocks: C3A."""
    _, across, size = p.kernel.shape
    rows = torch.arange(tile.start, tile.stop, device=p.kernel.device)
    turned = (torch.arange(size, device=p.kernel.device) - rows[:, None]) % size  # [rows, b]
    blocks = p.kernel[rows // size].gather(2, turned[:, None].expand(-1, across, -1))
    return blocks.flatten(1) / (across * size)
