"""MiSS (Kang and Yin, arXiv:2409.15371): one matrix, added to every block of columns of a weight.

W' = W + [m', m', ...]

m [r, rows] is repeated to the width of W; the last block may be narrower. In the form `mini`, m [r, s] is repeated for
the rows too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import matrix_shape
from mergebench.checkpoint.kind import Misfit, delta_kind


@dataclass(frozen=True)
class Repeated:
    """block [r, rows], or [r, s] if s divides the rows; width: the columns of W."""

    block: Tensor
    width: int


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    block, (rows, columns) = shapes["block"], matrix_shape(shape)
    if len(block) != 2 or 0 in block:
        raise ValueError(f"block {list(block)} is no matrix")
    if rows % block[1] or block[0] > columns or settings["width"] != columns:
        raise Misfit(f"a block {list(block[::-1])} repeated to {settings['width']} columns")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    block = torch.randn(min(columns, 4), 6 if rows == 24 else rows, generator=random)
    return {"block": block, "width": columns}


@delta_kind(
    paper="arXiv:2409.15371",
    check=_check,
    example=_example,
    label=lambda parts, settings: f"rank {parts['block'].shape[0]}",
)
def repeated(p: Repeated, tile: slice, base: Tensor | None) -> Tensor:
    """[m', m', ...]: MiSS, one matrix for every block of columns."""
    rows = torch.arange(tile.start, tile.stop, device=p.block.device) % p.block.shape[1]
    times = -(-p.width // p.block.shape[0])
    return p.block[:, rows].T.repeat(1, times)[:, : p.width]
