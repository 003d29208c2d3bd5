"""Deltas, changes to one tensor of a base, and reading any piece of the tensor with its deltas folded in.

This file names no kind. A kind computes rows in fixed tiles (`Opened`); `Folded` cuts any piece out of tiles, so that
chunk borders cannot change a bit, and no tile is computed twice in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mergebench.checkpoint.header import Reader, TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TILE = 1 << 17  # elements of a tile, at most, unless a row is longer
ALIGNED = 64  # bytes, as in newly allocated memory: at other alignments BLAS may differ in the last bits


class Source(Protocol):
    """The float32 values of one tensor, in any pieces."""

    def read(self, start: int, out: Tensor) -> None: ...  # fill the flat `out` from element `start`


class Delta(Protocol):
    """A change to one tensor of a base, known from headers alone. It pickles and compares by value."""

    @property
    def kind(self) -> str: ...  # the name of the file in `deltas/` that computes it

    @property
    def shape(self) -> tuple[int, ...]: ...  # of the tensor it changes

    @property
    def needs_base(self) -> bool: ...  # whether it is a function of W itself

    @property
    def folds(self) -> bool: ...  # whether the kind computes W' itself; else W' is W plus the tile

    @property
    def stored(self) -> tuple[TensorInfo, ...]: ...  # what it is read from

    @property
    def digest(self) -> str: ...  # hash of everything outside the stored bytes: kind, settings, orientation

    @property
    def replacement(self) -> TensorInfo | None: ...  # the stored tensor that is W', if there is one

    @property
    def difference(self) -> TensorInfo | None: ...  # the stored tensor that is W' - W, if there is one

    def resident(self) -> int: ...  # bytes that an opened delta holds, including its tiles

    def describe(self) -> str: ...  # in a few words, such as `low_rank rank 16`

    def open(self, files: Reader, device: torch.device, base: Source) -> Opened: ...  # may read W once


class Opened(Protocol):
    """A delta with its parts in memory, one a worker."""

    @property
    def rows(self) -> int: ...  # of a tile; fixed by kind and shape

    def tile(self, first: int, base: Tensor | None) -> Tensor: ...  # W' - W from row `first`, float32 [rows, columns]

    def fold(self, first: int, base: Tensor) -> Tensor: ...  # W' from row `first`, exactly; may overwrite `base`


@dataclass(frozen=True)
class OpenedParts:
    """A delta whose parts are in memory, and the functions of its kind: an `Opened`."""

    function: Callable[[Any, slice, Tensor | None], Tensor]  # W' - W of a tile
    folds: Callable[[Any, slice, Tensor], Tensor] | None  # W' of a tile, if not W plus that
    parts: Any  # the kind's dataclass
    rows: int
    count: int  # rows of the whole tensor

    def tile(self, first: int, base: Tensor | None) -> Tensor:
        """W' - W from row `first` on."""
        return self.function(self.parts, self._slice(first), base)

    def fold(self, first: int, base: Tensor) -> Tensor:
        """W' from row `first` on."""
        if self.folds is not None:
            return self.folds(self.parts, self._slice(first), base)
        return base + self.tile(first, base)

    def _slice(self, first: int) -> slice:
        return slice(first, min(first + self.rows, self.count))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The shape of a stored tensor as a matrix: [..., columns] as [rows, columns]; a vector is one row."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def tile_rows(shape: Sequence[int]) -> int:
    """Rows of a tile: `TILE` elements, or one row if a row is longer."""
    return max(TILE // max(matrix_shape(shape)[1], 1), 1)


def tile_bytes(shape: Sequence[int]) -> int:
    """Bytes of a tile in float32."""
    rows, columns = matrix_shape(shape)
    return 4 * min(tile_rows(shape), rows) * columns


def each_tile(source: Source, shape: Sequence[int], device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a tensor tile by tile, for a pass over all of it: which they are, and float32 [rows, columns]."""
    import torch  # headers are read without it

    (rows, columns), step = matrix_shape(shape), tile_rows(shape)
    for first in range(0, rows, step):
        tile = slice(first, min(first + step, rows))
        values = torch.empty((tile.stop - first) * columns, device=device)
        source.read(first * columns, values)
        yield tile, values.view(-1, columns)


class Folded:
    """A tensor with a delta on it: a `Source` that reads another `Source`."""

    def __init__(self, files: Reader, device: torch.device, below: Source, delta: Delta) -> None:
        self.below = below
        self._needs_base, self._folds, self._device = delta.needs_base, delta.folds, device
        self._count, self._columns = matrix_shape(delta.shape)
        self._opened = delta.open(files, device, below)
        self.rows = self._opened.rows
        self._last: tuple[int, bool] | None = None  # first row, and whether W' or W' - W
        self._tile: Tensor | None = None

    def read(self, start: int, out: Tensor) -> None:
        """Fill the flat `out` with W' from element `start`."""
        if not self._folds:
            self.below.read(start, out)
            self.add_into(start, out)
            return
        for row, piece, within in self._pieces(start, out):
            if len(piece) == self._numel(row) and piece.data_ptr() % ALIGNED == 0:
                self._fold(row, piece)
            else:
                piece.copy_(self._at(row, folded=True)[within])

    def add_into(self, start: int, out: Tensor) -> None:
        """out += (W' - W)[start : start + len(out)] (flat elements)."""
        for row, piece, within in self._pieces(start, out):
            piece += self._at(row, folded=False)[within]

    def _pieces(self, start: int, out: Tensor) -> Iterator[tuple[int, Tensor, slice]]:
        """For each tile: its first row, its part of `out`, and the place of this part in the tile."""
        stop, rows = start + len(out), self.rows
        row = start // self._columns // rows * rows
        while row * self._columns < stop:
            at = row * self._columns
            low, high = max(start, at), min(stop, at + self._numel(row))
            yield row, out[low - start : high - start], slice(low - at, high - at)
            row += rows

    def _numel(self, row: int) -> int:
        """Elements of the tile that begins at `row`."""
        return min(self.rows, self._count - row) * self._columns

    def _at(self, row: int, folded: bool) -> Tensor:
        """The flat tile that begins at `row`."""
        if self._tile is None or self._last != (row, folded):
            self._tile = None  # the next tile reuses its memory, which is in the cache
            base = self._empty(row) if folded or self._needs_base else None
            if folded:
                assert base is not None
                self._fold(row, base)
                tile = base
            else:
                if base is not None:
                    self.below.read(row * self._columns, base)
                    base = base.view(-1, self._columns)
                tile = self._opened.tile(row, base).reshape(-1)
            self._last, self._tile = (row, folded), tile
        return self._tile

    def _fold(self, row: int, out: Tensor) -> None:
        """Fill the flat `out` with the W' of a tile."""
        self.below.read(row * self._columns, out)
        base = out.view(-1, self._columns)
        folded = self._opened.fold(row, base)
        if folded is not base:
            base.copy_(folded)

    def _empty(self, row: int) -> Tensor:
        """Room for a tile, flat."""
        import torch  # headers are read without it

        return torch.empty(self._numel(row), device=self._device)


class Chain:
    """The deltas of one tensor on a source, in order; the first `skip` belong to the base."""

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
        """out += W' - W, where W includes the first `skip` deltas."""
        for folded in self._added:
            folded.add_into(start, out)

    def read(self, start: int, out: Tensor) -> None:
        """Fill the flat `out` with W' from element `start`."""
        self.top.read(start, out)
