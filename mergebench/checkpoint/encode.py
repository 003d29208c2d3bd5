"""Tensors written in eight or four bits, with the scales of their blocks.

    e4m3    scale = max |w| of the block / 448, value = w / scale, rounded to the nearest (ties to even)
    mxfp4   scale = 2^(floor(log2 max |w|) - 2), the rule of OCP Microscaling 1.0 for e2m1, whose largest exponent is 2;
            value = w / scale, rounded to the nearest (ties to even), at most 6

A block whose values the base's own scale holds exactly keeps that scale: what a merge leaves unchanged is written as
the base's bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergebench.checkpoint.files import TORCH_DTYPE, whole
from mergebench.checkpoint.fp4 import E2M1, Form, Packed, powers
from mergebench.checkpoint.fp8 import Scaler
from mergebench.checkpoint.header import Reader, Scale, TensorInfo
from mergebench.checkpoint.shards import OutTensor

LARGEST = 448.0  # of e4m3
_TINY = torch.finfo(torch.float32).tiny
_VALUES = np.array(E2M1, np.float32)
_NOWHERE = Path()


class Strip(NamedTuple):
    """Bytes of a part of the output: rows of equal length, `stride` bytes apart from `start` on."""

    part: str
    start: int
    stride: int
    rows: Tensor  # uint8 [rows, bytes]


class Rounding(NamedTuple):
    """How far values were moved: sums of squares of the change, and of the values."""

    moved: float
    size: float

    def __add__(self, other: Rounding) -> Rounding:  # type: ignore[override]
        return Rounding(self.moved + other.moved, self.size + other.size)


NONE = Rounding(0.0, 0.0)


class Blocks(NamedTuple):
    """Of rows of scale blocks, from the row `first` on: the largest |w|, and whether the base's scale holds all."""

    first: int
    largest: Tensor  # [rows of blocks, blocks]
    exact: Tensor  # [rows of blocks, blocks], 1 or 0


@dataclass(frozen=True)
class Eight:
    """A tensor in e4m3: its scales depend on all elements, so they are measured before it is written."""

    name: str
    shape: tuple[int, ...]
    scale: OutTensor
    grid: tuple[int, ...]  # scales along each dimension
    blocks: tuple[int, ...]  # elements of a block along each dimension
    base: TensorInfo | None = None  # as the base stores it

    kind = "float8_e4m3"
    measured = True

    @cached_property
    def parts(self) -> tuple[OutTensor, ...]:
        """The tensors of the file."""
        numel = int(np.prod(self.shape))
        return OutTensor(self.name, "F8_E4M3", self.shape, numel), self.scale

    @property
    def step(self) -> int:
        """Elements that a chunk has a multiple of: a row."""
        return self.shape[-1]

    @cached_property
    def _info(self) -> TensorInfo:
        stored = TensorInfo(*self.scale[:3], _NOWHERE, 0, 0)
        return TensorInfo(self.name, "F8_E4M3", self.shape, _NOWHERE, 0, 0, None, Scale(stored, self.grid, self.blocks))

    def _rows(self, scales: Tensor, start: int, numel: int) -> tuple[Tensor, Scaler]:
        """The row of scales of each row of a chunk, which has whole rows."""
        scaler = Scaler(self._info, scales)
        return scaler.rows(start // self.step, (start + numel) // self.step), scaler

    def measure(self, files: Reader, start: int, values: Tensor) -> Blocks:
        """The blocks that a chunk lies in, as far as it goes; values: float32 [elements]."""
        known = self._stored_scale(files, values.device)
        rows, _ = self._rows(torch.zeros(self.grid), start, len(values))
        rows = rows.to(values.device)
        width, count = self.blocks[-1], self.grid[-1]
        first = int(rows.min())
        matrix = values.view(-1, self.step)
        largest = _by_block(matrix.abs(), rows - first, width, count, "amax")
        if known is None:
            return Blocks(first, largest.cpu(), torch.zeros_like(largest).cpu())
        scale = known[rows].repeat_interleave(width, 1)[:, : self.step]
        exact = (_rounded(matrix, scale).float() * scale == matrix).float()
        return Blocks(first, largest.cpu(), _by_block(exact, rows - first, width, count, "amin").cpu())

    def scales(self, files: Reader, found: Iterable[Blocks]) -> Tensor:
        """The scales, in the type they are stored in, from what all chunks have measured."""
        lines = int(np.prod(self.grid[:-1]))
        largest, exact = torch.zeros(lines, self.grid[-1]), torch.ones(lines, self.grid[-1])
        for first, high, same in found:
            stop = first + len(high)
            largest[first:stop] = torch.maximum(largest[first:stop], high)
            exact[first:stop] = torch.minimum(exact[first:stop], same)
        stored = TORCH_DTYPE[self.scale.dtype]
        fresh = torch.where(largest > 0, (largest / LARGEST).clamp(min=_TINY), 1.0)
        if stored == torch.float8_e8m0fnu:  # the next power of two, so that no value is cut
            mantissa, exponent = torch.frexp(fresh)
            fresh = torch.ldexp(torch.ones_like(fresh), exponent - (mantissa == 0.5).int())
        known = self._stored_scale(files, largest.device)
        if known is not None:
            fresh = torch.where(exact > 0, known, fresh)
        return fresh.to(stored).view(self.grid)

    def _stored_scale(self, files: Reader, device: torch.device) -> Tensor | None:
        """The base's scales, [rows of blocks, blocks]."""
        if self.base is None or self.base.scale is None:
            return None
        return whole(files, self.base.scale.stored).float().view(-1, self.grid[-1]).to(device)

    def encode(self, files: Reader, start: int, values: Tensor, scales: Tensor | None) -> tuple[list[Strip], Rounding]:
        """A chunk in bytes; its first one has the scales too."""
        assert scales is not None
        rows, scaler = self._rows(scales.to(values.device), start, len(values))
        scale = scaler.scale[rows].repeat_interleave(self.blocks[-1], 1)[:, : self.step]
        matrix = values.view(-1, self.step)
        codes = _rounded(matrix, scale)
        strips = [Strip(self.name, start, len(values), codes.view(torch.uint8).view(1, -1).cpu())]
        if not start:
            raw = scales.contiguous().view(-1).view(torch.uint8)[None]
            strips.append(Strip(self.scale.name, 0, raw.shape[1], raw))
        return strips, _rounding(matrix, codes.float() * scale)


@dataclass(frozen=True)
class Four:
    """A tensor in MXFP4: its scales are those of groups of a chunk."""

    name: str
    shape: tuple[int, ...]
    form: Form
    base: Packed | None = None  # as the base stores it

    kind = "mxfp4"
    measured = False

    @cached_property
    def parts(self) -> tuple[OutTensor, ...]:
        """The tensors of the file: values, then scales."""
        *lead, rows, columns = self.shape
        if self.form.turned:
            rows, columns = columns, rows
        groups = columns // self.form.group
        codes = (*lead, rows, groups, self.form.group // 2) if self.form.turned else (*lead, rows, columns // 2)
        given = (codes, (*lead, rows, groups))
        types = ("U8", "U8" if self.base is None else self.base.scales.dtype)
        return tuple(
            OutTensor(self.name + end, dtype, shape, int(np.prod(shape)))
            for end, dtype, shape in zip(self.form.ends, types, given, strict=True)
        )

    @property
    def step(self) -> int:
        """Elements that a chunk has a multiple of: a group; where the file has it turned, one of each row."""
        return self.form.group * (self.shape[-1] if self.form.turned else 1)

    def encode(self, files: Reader, start: int, values: Tensor, scales: Tensor | None) -> tuple[list[Strip], Rounding]:
        """A chunk in bytes."""
        group, flat = self.form.group, values.cpu().numpy()
        if not self.form.turned:
            groups: NDArray[np.float32] = flat.reshape(-1, group)
            exponents = self._exponents(files, groups, start // group, len(groups), 1)
            codes, back = _four(groups, exponents)
            strips = [
                Strip(self.parts[0].name, start // 2, 0, torch.from_numpy(codes.reshape(1, -1))),
                Strip(self.parts[1].name, start // group, 0, torch.from_numpy(exponents.reshape(1, -1))),
            ]
            return strips, _rounding(values, torch.from_numpy(back.reshape(-1)))
        rows, per_row = self.shape[-1], self.shape[-2] // group
        size, strips, moved, total = rows * self.shape[-2], [], 0.0, 0.0
        for first in range(start - start % size, start + len(flat), size):  # matrix by matrix
            low, high = max(first, start), min(first + size, start + len(flat))
            part = flat[low - start : high - start].reshape(-1, rows)
            groups = np.ascontiguousarray(part.T).reshape(rows, -1, group)
            at = first // group + (low - first) // self.step  # of the first row's first group
            exponents = self._exponents(files, groups, at, groups.shape[1], per_row)
            codes, back = _four(groups, exponents)
            half = group // 2
            strips += [
                Strip(self.parts[0].name, at * half, per_row * half, torch.from_numpy(codes.reshape(rows, -1))),
                Strip(self.parts[1].name, at, per_row, torch.from_numpy(exponents.reshape(rows, -1))),
            ]
            change = _rounding(torch.from_numpy(groups), torch.from_numpy(back))
            moved, total = moved + change.moved, total + change.size
        return strips, Rounding(moved, total)

    def _exponents(
        self, files: Reader, groups: NDArray[np.float32], start: int, width: int, stride: int
    ) -> NDArray[np.uint8]:
        """The bytes of the groups' scales: the base's where it holds all values of the group."""
        _, exponent = np.frexp(np.abs(groups).max(-1))
        fresh = np.where(groups.any(-1), (exponent + (127 - 3)).clip(0, 254), 0).astype(np.uint8)
        if self.base is None:
            return fresh
        lines = 1 if groups.ndim == 2 else len(groups)
        raw = np.empty((lines - 1) * stride + width, np.uint8)
        files.read_into(self.base.scales, start, raw.data)
        known = np.lib.stride_tricks.as_strided(raw, (lines, width), (stride, 1)).reshape(fresh.shape)
        _, back = _four(groups, known)
        exact: NDArray[np.bool_] = (back == groups).all(-1)
        return np.where(exact, known, fresh)


Encoding = Eight | Four


def _rounded(matrix: Tensor, scale: Tensor) -> Tensor:
    return (matrix / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _by_block(matrix: Tensor, rows: Tensor, width: int, count: int, how: str) -> Tensor:
    """The largest or smallest value of each block: `width` columns, and the rows of one number."""
    fill = 0.0 if how == "amax" else 1.0
    padded = torch.nn.functional.pad(matrix, (0, width * count - matrix.shape[1]), value=fill)
    by_row = padded.view(len(matrix), count, width)
    reduced = by_row.amax(-1) if how == "amax" else by_row.amin(-1)
    out = torch.full((int(rows.max()) + 1, count), fill, device=matrix.device)
    return out.scatter_reduce_(0, rows[:, None].expand(-1, count), reduced, how)


def _four(groups: NDArray[np.float32], exponents: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Groups of values under their scales: bytes [.., groups, 16], and what they stand for, float32."""
    scale = powers()[exponents][..., None]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        size = np.abs(groups) / scale
    # the borders between 0, 0.5, 1, 1.5, 2, 3, 4 and 6; a tie goes to the even code
    codes: NDArray[np.uint8] = (size > 0.25).view(np.uint8) + (size >= 0.75).view(np.uint8)
    codes += (size > 1.25).view(np.uint8) + (size >= 1.75).view(np.uint8)
    codes += (size > 2.5).view(np.uint8) + (size >= 3.5).view(np.uint8) + (size > 5).view(np.uint8)
    codes |= np.signbit(groups).view(np.uint8) << 3
    packed: NDArray[np.uint8] = codes[..., 0::2] | np.left_shift(codes[..., 1::2], np.uint8(4))
    back: NDArray[np.float32] = _VALUES[codes] * scale
    return packed, back


def _rounding(values: Tensor, back: Tensor) -> Rounding:
    moved, size = ((one * one).sum(dtype=torch.float64) for one in (back - values, values))
    return Rounding(float(moved), float(size))
