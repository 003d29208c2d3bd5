"""A change to one tensor of a base, and any piece of the tensor with its changes folded in.

This file names no kind. A kind gives rows in fixed tiles (`Opened`); `Folded` turns tiles into any piece, so that no
border of a chunk can change a bit, and no tile is made twice in a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from mergebench.checkpoint.header import Reader, TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TILE = 1 << 16  # elements of a tile, at most, unless a row is longer


class Source(Protocol):
    """The float32 values of one tensor, in any pieces."""

    def read(self, start: int, out: Tensor) -> None: ...  # fill the flat `out` from element `start`


class Delta(Protocol):
    """A change to one tensor of a base, known from headers alone. It pickles, and equal ones are equal."""

    @property
    def kind(self) -> str: ...  # the file in `deltas/` that computes it

    @property
    def shape(self) -> tuple[int, ...]: ...  # of the tensor it changes

    @property
    def needs_base(self) -> bool: ...  # whether it is a function of W itself

    @property
    def stored(self) -> tuple[TensorInfo, ...]: ...  # what it is read from

    @property
    def digest(self) -> str: ...  # of all that is not in those bytes: kind, settings, orientation

    @property
    def replacement(self) -> TensorInfo | None: ...  # the tensor that W' is, as it is stored

    @property
    def difference(self) -> TensorInfo | None: ...  # the tensor that W' - W is, as it is stored

    def resident(self) -> int: ...  # bytes that an open one holds, with the tiles that are made of it

    def describe(self) -> str: ...  # in a few words, such as `low_rank rank 16`

    def open(self, files: Reader, device: torch.device, base: Source) -> Opened: ...  # may pass over W once


class Opened(Protocol):
    """A delta with its parts in memory, one a worker."""

    @property
    def rows(self) -> int: ...  # of a tile: fixed by kind and shape

    def tile(self, first: int, base: Tensor | None) -> Tensor: ...  # W' - W from row `first`, float32 [rows, columns]

    def fold(self, first: int, base: Tensor) -> Tensor: ...  # W' there, exactly


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor as a matrix of the rows it is stored in: [..., columns] as [rows, columns]; a vector is one row."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def tile_rows(shape: Sequence[int]) -> int:
    """Rows of a tile: `TILE` elements, or one row where that is longer."""
    return max(TILE // max(matrix_shape(shape)[1], 1), 1)


class Folded:
    """A tensor with a delta on it: a source, on a source."""

    def __init__(self, files: Reader, device: torch.device, below: Source, delta: Delta) -> None:
        self.below, self.needs_base = below, delta.needs_base
        self._device = device
        self._count, self._columns = matrix_shape(delta.shape)
        self._opened = delta.open(files, device, below)
        self.rows = self._opened.rows
        self._last: tuple[int, bool] | None = None  # first row, and whether W' or W' - W
        self._tile: Tensor | None = None

    def read(self, start: int, out: Tensor) -> None:
        """Fill the flat `out` with W' from element `start`."""
        if not self.needs_base:
            self.below.read(start, out)
            self.add_into(start, out)
            return
        for piece, tile in self._pieces(start, out, folded=True):
            piece.copy_(tile)

    def add_into(self, start: int, out: Tensor) -> None:
        """out += (W' - W)[start : start + len(out)] (flat elements)."""
        for piece, tile in self._pieces(start, out, folded=False):
            piece += tile

    def _pieces(self, start: int, out: Tensor, folded: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of `out`, and the elements of a tile that belong there."""
        stop, rows = start + len(out), self.rows
        row = start // self._columns // rows * rows
        while row * self._columns < stop:
            tile, at = self._at(row, folded), row * self._columns
            low, high = max(start, at), min(stop, at + len(tile))
            yield out[low - start : high - start], tile[low - at : high - at]
            row += rows

    def _at(self, row: int, folded: bool) -> Tensor:
        """The flat tile that begins at `row`."""
        if self._tile is None or self._last != (row, folded):
            self._tile = None  # the next one is made where it was, in the cache
            rows = min(self.rows, self._count - row)
            base = None
            if self.needs_base:
                import torch  # headers are read without it

                base = torch.empty(rows * self._columns, device=self._device)
                self.below.read(row * self._columns, base)
                base = base.view(rows, self._columns)
            if folded:
                assert base is not None
                tile = self._opened.fold(row, base)
            else:
                tile = self._opened.tile(row, base)
            self._last, self._tile = (row, folded), tile.reshape(-1)
        return self._tile


class Chain:
    """The deltas of one tensor on a source, in their order, of which the first `skip` belong to the base."""

    def __init__(
        self, files: Reader, device: torch.device, base: Source, deltas: Sequence[Delta], skip: int = 0
    ) -> None:
        self.top: Source = base
        self._added: list[Folded] = []
        for number, delta in enumerate(deltas):
            self.top = folded = Folded(files, device, self.top, delta)
            if number >= skip:
                self._added.append(folded)

    def add_into(self, start: int, out: Tensor) -> None:
        """out += W' - W, where W has the first `skip` deltas."""
        for folded in self._added:
            folded.add_into(start, out)

    def read(self, start: int, out: Tensor) -> None:
        """Fill the flat `out` with W' from element `start`."""
        self.top.read(start, out)
