"""Bat (Kang and Yin, arXiv:2409.15371), MiSS with a product: every block of a weight times a matrix, plus that matrix.

    W'_gk = W_gk + W_gk m_g + m_g

W_gk [r, r] are the blocks of W; those of a row share m_g [r, r].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import matrix_shape, tile_rows
from mergebench.checkpoint.kind import Misfit, delta_kind


@dataclass(frozen=True)
class Blocks:
    """blocks [rows / r, r, r]."""

    blocks: Tensor


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    blocks, (rows, columns) = shapes["blocks"], matrix_shape(shape)
    if len(blocks) != 3 or blocks[1] != blocks[2] or 0 in blocks:
        raise ValueError(f"blocks {list(blocks)} are not square")
    if blocks[0] * blocks[1] != rows or columns % blocks[1]:
        raise Misfit(f"{blocks[0]} rows of blocks {list(blocks[1:])}")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    size = next(size for size in (4, 1) if rows % size == 0 == columns % size)
    return {"blocks": torch.randn(rows // size, size, size, generator=random)}


def _made(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    """The rows of all blocks that a tile touches, their products, and the sum."""
    rows, columns = matrix_shape(shape)
    return 12 * min(rows, tile_rows(shape) + 2 * shapes["blocks"][1]) * columns


@delta_kind(
    paper="arXiv:2409.15371",
    needs_base=True,
    made=_made,
    check=_check,
    example=_example,
    label=lambda parts, settings: f"blocks of {parts['blocks'].shape[1]}",
)
def blockwise(p: Blocks, tile: slice, base: Tensor | None) -> Tensor:
    """W_gk m_g + m_g block by block: Bat, MiSS with a product."""
    assert base is not None
    size, columns = p.blocks.shape[1], base.shape[1]
    first, stop = tile.start // size, -(-tile.stop // size)  # rows of blocks that the tile touches
    before, after = tile.start - first * size, stop * size - tile.stop
    whole = torch.nn.functional.pad(base, (0, 0, before, after))  # each row has its own result
    blocks = p.blocks[first:stop]
    products = whole.view(stop - first, -1, size) @ blocks
    added = products.view(stop - first, size, -1, size) + blocks[:, :, None]
    return added.reshape(-1, columns)[before : before + len(base)]
