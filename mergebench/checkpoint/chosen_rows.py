"""Tensors whose rows are chosen from stored ones: embeddings and heads of a model under another vocabulary.

Nothing is written out. A row comes from one stored row, or is the mean of several, or is zero; rows that pad
the vocabulary are the mean of all others, which is computed before the first chunk is read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergebench.checkpoint.files import TORCH_DTYPE
from mergebench.checkpoint.header import ITEM_SIZE, Reader, TensorInfo

BLOCK = 1 << 18  # elements added up at a time for the mean of all rows


@dataclass(eq=False)
class Rows:
    """Row i is the mean of the rows `chosen[k][i]` of the tensors `stored[k]`, skipping -1; zero if all are -1.

    The last `padding` rows are the mean of all before them.
    """

    own: TensorInfo  # the model's own tensor, as stored
    stored: tuple[TensorInfo, ...]
    chosen: NDArray[np.int32]  # [stored, rows]
    padding: int = 0
    _mean: Tensor | None = None

    @cached_property
    def _as_is(self) -> bool:
        """Whether rows are copied as they are stored."""
        one_type = len({info.dtype for info in self.stored}) == 1
        return bool(one_type and not self.padding and ((self.chosen >= 0).sum(axis=0) <= 1).all())

    @property
    def dtype(self) -> str:
        """The stored type where rows are copied, else float32."""
        return self.stored[0].dtype if self._as_is else "F32"

    @property
    def columns(self) -> int:
        return math.prod(self.own.shape[1:])

    def info(self) -> TensorInfo:
        """The tensor as the engine sees it."""
        shape = (self.chosen.shape[1] + self.padding, *self.own.shape[1:])
        nbytes = math.prod(shape) * ITEM_SIZE[self.dtype]
        return self.own._replace(dtype=self.dtype, shape=shape, nbytes=nbytes, made=self)

    def digest(self) -> str:
        """A hash of the choice."""
        found = hashlib.sha256(np.ascontiguousarray(self.chosen).tobytes())
        found.update(repr([(info.name, str(info.file)) for info in self.stored] + [self.padding]).encode())
        return found.hexdigest()

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """The first row of each run; the rows of a run are consecutive in every source."""
        before, after = self.chosen[:, :-1], self.chosen[:, 1:]
        follows = np.where(before >= 0, after == before + 1, after < 0).all(axis=0)
        return np.concatenate([np.zeros(1, np.int64), np.flatnonzero(~follows) + 1, [self.chosen.shape[1]]])

    def read(self, files: Reader, start: int, out: Tensor) -> None:
        """Fill the flat `out` (of this tensor's type) with elements `start` onwards."""
        columns, stop = self.columns, start + len(out)
        end = self.chosen.shape[1] * columns
        if start < end:
            (self._copy if self._as_is else self._mix)(files, start, out[: end - start])
        if stop > end:
            low = max(start, end)
            at = torch.arange(low - end, stop - end) % columns
            out[low - start :] = self._mean_row(files)[at]

    def _copy(self, files: Reader, start: int, out: Tensor) -> None:
        """Stored rows as they are, run by run."""
        size = self.columns * out.element_size()
        begin, view = start * out.element_size(), out.view(torch.uint8).numpy().data
        end = begin + len(view)
        first = int(np.searchsorted(self._starts, begin // size, side="right")) - 1
        last = int(np.searchsorted(self._starts, (end - 1) // size, side="right"))
        edges = (self._starts[first : last + 1] * size).tolist()
        sources = self.chosen[:, self._starts[first:last]].T.tolist()
        for at, until, rows in zip(edges[:-1], edges[1:], sources, strict=True):
            low, high = max(begin, at), min(end, until)
            piece = view[low - begin : high - begin]
            for info, row in zip(self.stored, rows, strict=True):
                if row >= 0:
                    files.read_into(info, row * size + low - at, piece)
                    break
            else:
                piece[:] = bytes(len(piece))

    def _mix(self, files: Reader, start: int, out: Tensor) -> None:
        """Means of stored rows, added in the order of the models; whole rows are read."""
        columns = self.columns
        first, last = start // columns, -(-(start + len(out)) // columns)
        total = torch.zeros((last - first, columns))
        chosen = self.chosen[:, first:last]
        for info, rows in zip(self.stored, chosen, strict=True):
            places = np.flatnonzero(rows >= 0)
            if len(places):
                part = _rows(files, info, rows[places], columns).float()
                total.index_add_(0, torch.from_numpy(places), part)
        total /= torch.from_numpy((chosen >= 0).sum(axis=0).clip(1).astype(np.float32)).unsqueeze(1)
        out.copy_(total.view(-1)[start - first * columns :][: len(out)])

    def resident(self) -> int:
        """The mean of all rows, if one is padding."""
        return 4 * self.columns * bool(self.padding)

    def settle(self, files: Reader) -> None:
        """Compute now what all workers need: where runs start, and the padding row, which takes a sweep."""
        _ = self._starts
        if self.padding:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # so that the bits do not depend on the number of threads
            try:
                self._mean_row(files)
            finally:
                torch.set_num_threads(threads)

    def _mean_row(self, files: Reader) -> Tensor:
        """The mean of all rows, as stored rows times their counts, in the order of the files."""
        if self._mean is None:
            columns, count = self.columns, self.chosen.shape[1]
            parts = (self.chosen >= 0).sum(axis=0).clip(1)
            total = torch.zeros(columns, dtype=torch.float64)
            step = max(BLOCK // columns, 1)
            for info, rows in zip(self.stored, self.chosen, strict=True):
                used = rows >= 0
                share = np.bincount(rows[used], 1 / parts[used], info.shape[0])
                for row in range(0, info.shape[0], step):
                    block = torch.empty(min(step, info.shape[0] - row) * columns, dtype=TORCH_DTYPE[info.dtype])
                    files.read_elements(info, row * columns, block)
                    total += torch.from_numpy(share[row : row + step]) @ block.view(-1, columns).double()
            self._mean = (total / count).float()
        return self._mean


def _rows(files: Reader, info: TensorInfo, rows: NDArray[np.int32], columns: int) -> Tensor:
    """Rows of a stored tensor, [rows, columns]; neighbours are read at once."""
    out = torch.empty(len(rows) * columns, dtype=TORCH_DTYPE[info.dtype])
    view, size = out.view(torch.uint8).numpy().data, columns * out.element_size()
    edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    for low, high in pairwise(edges):
        files.read_into(info, int(rows[low]) * size, view[low * size : high * size])
    return out.view(-1, columns)


def choose(own: TensorInfo, stored: Sequence[TensorInfo], chosen: NDArray[np.int64], padding: int) -> TensorInfo:
    """The tensor `own` under another vocabulary: rows `chosen` [stored, rows], as in `Rows`."""
    used = [k for k in range(len(stored)) if (chosen[k] >= 0).any()] or [0]
    if len(used) == 1 and stored[used[0]] is own and not padding:
        rows = chosen[used[0]]
        if len(rows) == own.shape[0] and np.array_equal(rows, np.arange(len(rows))):
            return own  # as it is
    return Rows(own, tuple(stored[k] for k in used), chosen[used].astype(np.int32), padding).info()
