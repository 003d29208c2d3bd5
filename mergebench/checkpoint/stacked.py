"""A delta on a tensor of equal blocks of rows, such as fused experts, from deltas on the blocks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mergebench.checkpoint.delta import Delta, Opened, Source, matrix_shape, tile_rows
from mergebench.checkpoint.header import Reader, TensorInfo
from mergebench.checkpoint.kind import StoredDelta

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Stacked:
    """Deltas on blocks of `rows` rows, by number; other blocks are unchanged. A `Delta`."""

    shape: tuple[int, ...]
    rows: int  # of a block
    blocks: tuple[tuple[int, Delta], ...]  # ascending

    @property
    def _first(self) -> Delta:
        return self.blocks[0][1]

    @property
    def kind(self) -> str:
        return self._first.kind

    @property
    def needs_base(self) -> bool:
        return any(delta.needs_base for _, delta in self.blocks)

    @property
    def folds(self) -> bool:
        return any(delta.folds for _, delta in self.blocks)

    @cached_property
    def stored(self) -> tuple[TensorInfo, ...]:
        return tuple(dict.fromkeys(info for _, delta in self.blocks for info in delta.stored))

    @cached_property
    def digest(self) -> str:
        """16 hex digits: a hash of everything outside the stored bytes."""
        listed = [self.shape, self.rows, [(number, delta.digest) for number, delta in self.blocks]]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]

    @property
    def replacement(self) -> TensorInfo | None:
        return None

    @property
    def difference(self) -> TensorInfo | None:
        return None

    @cached_property
    def tile(self) -> int:
        """Rows of a tile, which lies in one block: that of the blocks' deltas if it divides a block, else a block."""
        usual = tile_rows(self.shape)
        deltas = [delta for _, delta in self.blocks]
        alike = all(isinstance(delta, StoredDelta) and delta.of.rows(delta.shape) == usual for delta in deltas)
        return usual if alike and self.rows % usual == 0 else self.rows

    def resident(self) -> int:
        """One block's delta is open at a time."""
        return max(delta.resident() for _, delta in self.blocks) + 3 * 4 * self.tile * matrix_shape(self.shape)[1]

    def describe(self) -> str:
        return f"{self._first.describe()}, {len(self.blocks)} blocks"

    def open(self, files: Reader, device: torch.device, base: Source) -> Opened:
        """Open the delta; the blocks' deltas are opened when they are met."""
        return _Opened(self, files, device, base)


class _Opened:
    """A delta on blocks, the last block that was met in memory: an `Opened`."""

    def __init__(self, of: Stacked, files: Reader, device: torch.device, base: Source) -> None:
        self.rows = of.tile
        self._of, self._files, self._device, self._base = of, files, device, base
        self._deltas = dict(of.blocks)
        self._last: tuple[int, Opened] | None = None

    def tile(self, first: int, base: Tensor | None) -> Tensor:
        """W' - W from row `first` on."""
        import torch  # headers are read without it

        columns = matrix_shape(self._of.shape)[1]
        out = torch.full((self.rows, columns), -0.0, device=self._device)  # adding it changes no bit
        opened, at = self._block(first)
        if opened is not None:
            for row in range(0, self.rows, opened.rows):
                piece = slice(row, min(row + opened.rows, self.rows))
                out[piece] = opened.tile(at + row, None if base is None else base[piece])
        return out

    def fold(self, first: int, base: Tensor) -> Tensor:
        """W' from row `first` on."""
        opened, at = self._block(first)
        if opened is not None:
            for row in range(0, self.rows, opened.rows):
                piece = base[row : min(row + opened.rows, self.rows)]
                folded = opened.fold(at + row, piece)
                if folded is not piece:
                    piece.copy_(folded)
        return base

    def _block(self, first: int) -> tuple[Opened | None, int]:
        """The open delta of the block that has row `first`, and the row in the block."""
        number, at = divmod(first, self._of.rows)
        delta = self._deltas.get(number)
        if delta is None:
            return None, at
        if self._last is None or self._last[0] != number:
            self._last = None  # its memory is free for the next
            start = number * self._of.rows * matrix_shape(self._of.shape)[1]
            self._last = number, delta.open(self._files, self._device, _From(self._base, start))
        return self._last[1], at


@dataclass(frozen=True)
class _From:
    """A tensor from one of its elements on: a `Source`."""

    whole: Source
    first: int

    def read(self, start: int, out: Tensor) -> None:
        self.whole.read(self.first + start, out)


def stacked(shape: tuple[int, ...], rows: int, blocks: Mapping[int, Delta]) -> Stacked:
    """A delta on a tensor of this shape from deltas on its blocks of `rows` rows."""
    return Stacked(shape, rows, tuple(sorted(blocks.items())))
