"""The parts of a delta: their sorts, and how each is read."""

from __future__ import annotations

import typing
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from mergebench.checkpoint.delta import matrix_shape
from mergebench.checkpoint.files import TORCH_DTYPE, whole
from mergebench.checkpoint.header import Reader, TensorInfo

# Parts as large as the tensor itself: `p.values[tile]` reads only the rows of a tile.
Indices = Annotated[Tensor, "indices"]  # integers, read whole as int64
Rows = Annotated[Tensor, "rows"]  # has the tensor's shape
Mask = Annotated[Tensor, "mask"]  # one bit per element, packed: bit i % 8 of byte i // 8 is element i's


def sort_of(hint: Any) -> str:
    """The sort of a field, by its type."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        return str(hint.__metadata__[0])
    if typing.get_origin(hint) is tuple and arguments == (Tensor, ...):
        return "tensors"
    for inner in (hint, *arguments):
        if typing.get_origin(inner) is Annotated:
            return sort_of(inner)
    return "tensor" if Tensor in (hint, *arguments) else "setting"


def load(
    files: Reader, device: torch.device, info: TensorInfo, transposed: bool, sort: str, shape: tuple[int, ...]
) -> Any:
    """A part in memory, floats as float32; for a part as large as the tensor of this `shape`, a reader of its rows."""
    if sort == "rows":
        return _StreamedRows(files, device, info, shape)
    if sort == "mask":
        return _StreamedMask(files, device, info, shape)
    values = whole(files, info)
    values = values.float() if info.is_float else values.long()
    return (values.T.contiguous() if transposed else values).to(device)


class _StreamedRows:
    """Rows of a stored tensor, read on request."""

    def __init__(self, files: Reader, device: torch.device, info: TensorInfo, shape: tuple[int, ...]) -> None:
        self._files, self._device, self._info = files, device, info
        self._columns = matrix_shape(shape)[1]

    def __getitem__(self, tile: slice) -> Tensor:
        """float32 [rows, columns]."""
        rows = torch.empty((tile.stop - tile.start) * self._columns, dtype=TORCH_DTYPE[self._info.dtype])
        self._files.read_elements(self._info, tile.start * self._columns, rows)
        return rows.to(self._device).float().view(-1, self._columns)


class _StreamedMask:
    """Rows of a mask of packed bits, read on request."""

    def __init__(self, files: Reader, device: torch.device, info: TensorInfo, shape: tuple[int, ...]) -> None:
        self._files, self._device, self._info = files, device, info
        self._columns = matrix_shape(shape)[1]

    def __getitem__(self, tile: slice) -> Tensor:
        """uint8 [rows, columns], zeros and ones."""
        first, stop = tile.start * self._columns, tile.stop * self._columns
        packed = np.empty(max((stop - 1) // 8 - first // 8 + 1, 0) if stop > first else 0, np.uint8)
        self._files.read_into(self._info, first // 8, packed.data)
        bits = np.unpackbits(packed, bitorder="little")[first % 8 :][: stop - first]
        return torch.from_numpy(bits).to(self._device).view(-1, self._columns)
