"""Read tensor bytes with `pread` into buffers the caller owns, and turn them into float32.

Memory-mapped pages would count against a user's memory limit; reused buffers do not grow.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mergebench.checkpoint.header import TensorInfo, damaged
from mergebench.checkpoint.lora import LowRank
from mergebench.checkpoint.masked import Masked
from mergebench.checkpoint.model import Delta, Model
from mergebench.checkpoint.patched import Patched
from mergebench.errors import RunError

TORCH_DTYPE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "C64": torch.complex64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
LOW_RANK_TILE = 64  # rows of B computed at once: fixed, so that bits do not depend on the chunk


class Files:
    """Open file descriptors, shared by all threads (`pread` has no position to fight over)."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, file: Path) -> int:
        number = self._open.get(file)
        if number is None:
            with self._lock:
                if file not in self._open:
                    try:
                        self._open[file] = os.open(file, os.O_RDONLY)
                    except OSError as error:
                        raise RunError(f"{file}: cannot be read: {error.strerror}") from None
                number = self._open[file]
        return number

    def close(self) -> None:
        with self._lock:
            for number in self._open.values():
                os.close(number)
            self._open.clear()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_into(self, file: Path, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`."""
        number, got = self.descriptor(file), 0
        while got < len(buffer):
            try:
                count = os.preadv(number, [buffer[got:]], offset + got)
            except OSError as error:
                raise RunError(f"{file}: cannot be read: {error.strerror}") from None
            if count == 0:
                raise damaged(file, "it became shorter while it was read")
            got += count

    def read_elements(self, tensor: TensorInfo, start: int, out: Tensor) -> None:
        """Fill the flat `out` (the tensor's own dtype) with elements `start` onwards."""
        if tensor.made is not None:
            tensor.made.read(self, start, out)
            return
        item = out.element_size()
        view = out.view(torch.uint8).numpy().data
        self.read_into(tensor.file, tensor.offset + start * item, view)

    def advise(self, tensor: TensorInfo, start: int, stop: int) -> None:
        """Tell the kernel that elements `start` to `stop` will be wanted soon."""
        if hasattr(os, "posix_fadvise") and tensor.numel and tensor.made is None:
            item = tensor.nbytes // tensor.numel
            where, size = tensor.offset + start * item, (stop - start) * item
            os.posix_fadvise(self.descriptor(tensor.file), where, size, os.POSIX_FADV_WILLNEED)


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


class Scaler:
    """The scale of one tensor in memory: multiplies any piece of it, a row or many at a time."""

    def __init__(self, info: TensorInfo, scale: Tensor) -> None:
        assert info.scale is not None
        self.shape, self.blocks = info.shape, info.scale.blocks
        self.scale = scale.float().reshape(-1, info.scale.shape[-1] if info.scale.shape else 1)
        self.sides = info.scale.shape
        self.columns = info.shape[-1] if info.shape else 1

    def multiply(self, start: int, out: Tensor) -> None:
        """out *= scale[start : start + len(out)] (flat elements)."""
        if self.scale.numel() == 1:
            out.mul_(self.scale.reshape(()))
            return
        at, columns = 0, self.columns
        while at < len(out):  # what is left of a row, then whole rows, then the start of one
            row, column = divmod(start + at, columns)
            size = min(columns - column, len(out) - at)
            if size == columns:
                size = (len(out) - at) // columns * columns
            piece = out[at : at + size]
            factors = self.scale[self._rows(row, row + -(-size // columns))]
            if self.scale.shape[1] == 1:
                piece.view(len(factors), -1).mul_(factors)
            elif size >= columns and columns % self.blocks[-1] == 0:
                piece.view(len(factors), factors.shape[1], -1).mul_(factors[:, :, None])
            else:
                wide = factors.repeat_interleave(self.blocks[-1], 1)[:, column : column + min(size, columns)]
                piece.view(len(factors), -1).mul_(wide)
            at += size

    def _rows(self, first: int, stop: int) -> Tensor:
        """Which rows of the scale belong to rows of the tensor, all dimensions but the last laid flat."""
        rows = torch.arange(first, stop, device=self.scale.device)
        found, stride = torch.zeros_like(rows), 1
        for side, block, count in zip(self.shape[-2::-1], self.blocks[-2::-1], self.sides[-2::-1], strict=True):
            found += rows % side // block * stride
            rows, stride = rows // side, stride * count
        return found


class Scales:
    """FP8 values times their scales; the scales of the tensors read last stay in memory."""

    KEPT = 64

    def __init__(self, files: Files) -> None:
        self._files = files
        self._kept: dict[tuple[Path, int], Scaler] = {}

    def multiply(self, tensor: TensorInfo, start: int, out: Tensor) -> None:
        """out *= what the stored elements `start` onwards are scaled by; nothing for a tensor without a scale."""
        if tensor.scale is None:
            return
        key = (tensor.file, tensor.offset)
        if key not in self._kept:
            if len(self._kept) >= self.KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = Scaler(tensor, whole(self._files, tensor.scale.stored).to(out.device))
        self._kept[key].multiply(start, out)


def whole(files: Files, tensor: TensorInfo) -> Tensor:
    """One tensor as stored."""
    out = torch.empty(tensor.numel, dtype=TORCH_DTYPE[tensor.dtype])
    if tensor.numel:
        files.read_elements(tensor, 0, out)
    return out.reshape(tensor.shape)


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
