"""Read tensor bytes with `pread` into buffers the caller owns, and turn them into float32.

Memory-mapped pages would count against a user's memory limit; reused buffers do not grow.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mergebench.checkpoint.files import TORCH_DTYPE, Files, whole
from mergebench.checkpoint.fp8 import Scales
from mergebench.checkpoint.lora import LowRank
from mergebench.checkpoint.masked import Masked
from mergebench.checkpoint.model import Delta, Model
from mergebench.checkpoint.patched import Patched

LOW_RANK_TILE = 64  # rows of B computed at once: fixed, so that bits do not depend on the chunk


class LowRankReader:
    """Rows of a low-rank difference, computed in fixed tiles so that a chunk's borders cannot change the bits."""

    def __init__(self, files: Files, delta: LowRank) -> None:
        b = whole(files, delta.b).float()
        a = torch.ones(1, 1) if delta.a is None else whole(files, delta.a).float()
        b = b.reshape(len(b), len(a))
        self.left, self.right = (a.T.contiguous(), b.T.contiguous()) if delta.transposed else (b, a)
        self.right = self.right * delta.scale
        self.columns = self.right.shape[1]
        self._dora = None if delta.magnitude is None else _Dora(files, delta, self)

    def add_into(self, start: int, out: Tensor) -> None:
        """out += delta[start : start + len(out)] (flat elements)."""
        stop = start + len(out)
        step = LOW_RANK_TILE
        row = start // self.columns // step * step
        while row * self.columns < stop:
            tile = (self.product(row) if self._dora is None else self._dora.tile(row)).reshape(-1)
            at = row * self.columns
            low, high = max(start, at), min(stop, at + len(tile))
            out[low - start : high - start] += tile[low - at : high - at]
            row += step

    def product(self, row: int) -> Tensor:
        """The tile of scale * B @ A that begins at `row`."""
        return self.left[row : row + LOW_RANK_TILE] @ self.right


class _Dora:
    """DoRA's difference m * (W + delta) / |W + delta| - W, tile by tile: the norms are those of output rows."""

    def __init__(self, files: Files, delta: LowRank, low_rank: LowRankReader) -> None:
        assert delta.magnitude is not None and delta.base is not None
        self._files, self._base, self._low_rank = files, delta.base, low_rank
        self._scales = Scales(files)
        self._magnitude = whole(files, delta.magnitude).float()
        self._last = -1, torch.empty(0)  # chunks are smaller than a tile of wide rows: do not read it again for each
        self._factor = None
        if delta.transposed:  # an output row is a column of the stored tensor: all of it before any of it
            squares = torch.zeros(low_rank.columns, dtype=torch.float64)
            for row in range(0, len(low_rank.left), LOW_RANK_TILE):
                squares += self._adapted(row)[1].double().square().sum(0)
            self._factor = self._magnitude / squares.sqrt().float()

    def tile(self, row: int) -> Tensor:
        if self._last[0] != row:
            base, adapted = self._adapted(row)
            factor = self._factor
            if factor is None:
                norms = torch.linalg.vector_norm(adapted, dim=1)
                factor = (self._magnitude[row : row + len(adapted)] / norms).unsqueeze(1)
            self._last = row, adapted.mul_(factor).sub_(base)
        return self._last[1]

    def _adapted(self, row: int) -> tuple[Tensor, Tensor]:
        """The tile of W that begins at `row`, and of W + scale * B @ A."""
        product = self._low_rank.product(row)
        base = torch.empty(product.numel(), dtype=TORCH_DTYPE[self._base.dtype])
        self._files.read_elements(self._base, row * self._low_rank.columns, base)
        base = base.float()
        self._scales.multiply(self._base, row * self._low_rank.columns, base)
        base = base.reshape(product.shape)
        return base, product.add_(base)


class MaskedReader:
    """Elements of a vector that a mask holds, times a factor."""

    BLOCK = 1 << 16  # elements read at once: a multiple of eight

    def __init__(self, files: Files, delta: Masked) -> None:
        self._files, self._delta = files, delta

    def add_into(self, start: int, out: Tensor) -> None:
        """out += delta[start : start + len(out)] (flat elements)."""
        vector, bits = self._delta.vector, self._delta.bits
        for at in range(0, len(out), self.BLOCK):
            piece, first = out[at : at + self.BLOCK], start + at
            values = torch.empty(len(piece), dtype=TORCH_DTYPE[vector.dtype])
            self._files.read_elements(vector, first, values)
            packed = np.empty((first + len(piece) - 1) // 8 - first // 8 + 1, np.uint8)
            self._files.read_into(bits.file, bits.offset + first // 8, packed.data)
            mask = np.unpackbits(packed, bitorder="little")[first % 8 :][: len(piece)]
            piece += values.float().mul_(self._delta.scale).mul_(torch.from_numpy(mask))


class PatchedReader:
    """A direction times an amount of its own for each changed neuron, rows or columns of a tensor."""

    def __init__(self, files: Files, delta: Patched) -> None:
        self._direction = whole(files, delta.direction)
        self._numbers, self._amounts = whole(files, delta.numbers), whole(files, delta.amounts)
        self._transposed, self._sides = delta.transposed, delta.shape[-2:]

    def add_into(self, start: int, out: Tensor) -> None:
        """out += delta[start : start + len(out)] (flat elements); what is not changed is not touched."""
        at, stop, (rows, columns) = start, start + len(out), self._sides
        while at < stop:  # what is left of a row, then whole rows of one expert, then the start of one
            row, column = divmod(at, columns)
            count = min((stop - at) // columns, rows - row % rows) if not column else 0
            end = at + count * columns if count else min(stop, (row + 1) * columns)
            self._add(row, column, out[at - start : end - start].view(max(count, 1), -1))
            at = end

    def _add(self, row: int, column: int, piece: Tensor) -> None:
        """The same for rows of the tensor from element `column` of `row` on, [rows, elements]."""
        high, wide = piece.shape
        if self._transposed:
            expert, coordinate = divmod(row, self._sides[0])
            first = expert * self._sides[1] + column
            low, stop = torch.searchsorted(self._numbers, torch.tensor([first, first + wide])).tolist()
            direction = self._direction[coordinate : coordinate + high, None]
            piece[:, self._numbers[low:stop] - first] += self._amounts[low:stop] * direction
        else:
            low, stop = torch.searchsorted(self._numbers, torch.tensor([row, row + high])).tolist()
            direction = self._direction[column : column + wide]
            piece[self._numbers[low:stop] - row] += self._amounts[low:stop, None] * direction


DeltaReader = LowRankReader | MaskedReader | PatchedReader


def delta_reader(files: Files, delta: Delta) -> DeltaReader:
    """What reads a difference in pieces."""
    if isinstance(delta, Patched):
        return PatchedReader(files, delta)
    return MaskedReader(files, delta) if isinstance(delta, Masked) else LowRankReader(files, delta)


def read_whole(model: Model, name: str) -> Tensor:
    """One tensor of a model: a float as float32 with the adapter folded in, any other as stored."""
    with Files() as files:
        info = model.tensors[name]
        value = whole(files, info)
        if not info.is_float:
            return value
        value = value.float()
        Scales(files).multiply(info, 0, value.reshape(-1))
        if name in model.deltas:
            delta_reader(files, model.deltas[name]).add_into(0, value.reshape(-1))
        return value
