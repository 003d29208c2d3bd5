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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergebench.checkpoint.header import ITEM_SIZE, TensorInfo
from mergebench.checkpoint.read import TORCH_DTYPE, Files

BLOCK = 1 << 18  # elements added up at a time for the mean of all rows


@dataclass(eq=False)
class Rows:
    """Row i is the mean of rows `chosen[k][i]` of the tensors `stored[k]`, of those that are not -1; without any, zero.

    The last `padding` rows are the mean of all before them.
    """

    own: TensorInfo  # the model's own tensor, as stored
    stored: tuple[TensorInfo, ...]
    chosen: NDArray[np.int32]  # [stored, rows]
    padding: int = 0
    _mean: Tensor | None = None

    @cached_property
    def dtype(self) -> str:
        """The stored type where rows are copied as they are, else float32."""
        kinds = {info.dtype for info in self.stored}
        as_is = len(kinds) == 1 and not self.padding and ((self.chosen >= 0).sum(axis=0) <= 1).all()
        return kinds.pop() if as_is else "F32"

    @property
    def columns(self) -> int:
        return math.prod(self.own.shape[1:])

    def info(self) -> TensorInfo:
        """The tensor as the engine sees it."""
        shape = (self.chosen.shape[1] + self.padding, *self.own.shape[1:])
        nbytes = math.prod(shape) * ITEM_SIZE[self.dtype]
        return self.own._replace(dtype=self.dtype, shape=shape, nbytes=nbytes, rows=self)

    def digest(self) -> str:
        """What identifies the choice."""
        found = hashlib.sha256(np.ascontiguousarray(self.chosen).tobytes())
        found.update(repr([(info.name, str(info.file)) for info in self.stored] + [self.padding]).encode())
        return found.hexdigest()

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """The first row of each run: rows that lie one after the other wherever they come from."""
        before, after = self.chosen[:, :-1], self.chosen[:, 1:]
        follows = np.where(before >= 0, after == before + 1, after < 0).all(axis=0)
        return np.concatenate([np.zeros(1, np.int64), np.flatnonzero(~follows) + 1, [self.chosen.shape[1]]])

    def read(self, files: Files, start: int, out: Tensor) -> None:
        """Fill the flat `out` (of this tensor's type) with elements `start` onwards."""
        columns, starts, stop = self.columns, self._starts, start + len(out)
        end = self.chosen.shape[1] * columns
        if start < end:
            first = int(np.searchsorted(starts, start // columns, side="right")) - 1
            last = int(np.searchsorted(starts, (min(stop, end) - 1) // columns, side="right"))
            edges = starts[first : last + 1].tolist()
            sources = self.chosen[:, starts[first:last]].T.tolist()
            for at, until, rows in zip(edges[:-1], edges[1:], sources, strict=True):
                low, high = max(start, at * columns), min(stop, until * columns)
                self._read_run(files, rows, low - at * columns, out[low - start : high - start])
        if stop > end:
            low = max(start, end)
            at = torch.arange(low - end, stop - end) % columns
            out[low - start :] = self._mean_row(files)[at]

    def _read_run(self, files: Files, rows: Sequence[int], offset: int, out: Tensor) -> None:
        """Elements of one run, from its element `offset` onwards; `rows`: its first row in each stored tensor."""
        count = 0
        for info, row in zip(self.stored, rows, strict=True):
            if row < 0:
                continue
            at = row * self.columns + offset
            if count == 0 and TORCH_DTYPE[info.dtype] == out.dtype:
                files.read_elements(info, at, out)
            else:
                part = torch.empty(len(out), dtype=TORCH_DTYPE[info.dtype])
                files.read_elements(info, at, part)
                out.add_(part) if count else out.copy_(part)
            count += 1
        if count == 0:
            out.zero_()
        elif count > 1:
            out.div_(count)

    def settle(self, files: Files) -> None:
        """Compute now what all workers need: where runs start, and the row that pads, which takes a sweep."""
        _ = self._starts
        if self.padding:
            self._mean_row(files)

    def _mean_row(self, files: Files) -> Tensor:
        if self._mean is None:
            count, columns = self.chosen.shape[1], self.columns
            total = torch.zeros(columns, dtype=torch.float64)
            step = max(BLOCK // columns, 1)
            for row in range(0, count, step):
                block = torch.empty(min(step, count - row) * columns, dtype=TORCH_DTYPE[self.dtype])
                self.read(files, row * columns, block)
                total += block.view(-1, columns).sum(dim=0, dtype=torch.float64)
            self._mean = (total / count).to(TORCH_DTYPE[self.dtype])
        return self._mean


def choose(own: TensorInfo, stored: Sequence[TensorInfo], chosen: NDArray[np.int64], padding: int) -> TensorInfo:
    """The tensor `own` under another vocabulary: rows `chosen` [stored, rows], as in `Rows`."""
    used = [k for k in range(len(stored)) if (chosen[k] >= 0).any()] or [0]
    if len(used) == 1 and stored[used[0]] is own and not padding:
        rows = chosen[used[0]]
        if len(rows) == own.shape[0] and np.array_equal(rows, np.arange(len(rows))):
            return own  # as it is
    return Rows(own, tuple(stored[k] for k in used), chosen[used].astype(np.int32), padding).info()
