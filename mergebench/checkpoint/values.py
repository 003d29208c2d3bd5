"""The values of a tensor as float32: stored values times the scale, with the model's deltas folded in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergebench.checkpoint.delta import Chain, Delta
from mergebench.checkpoint.files import TORCH_DTYPE, Files, whole
from mergebench.checkpoint.fp8 import Scales
from mergebench.checkpoint.header import TensorInfo

CPU = torch.device("cpu")


class Stored:
    """A tensor without deltas: a `Source`."""

    def __init__(self, files: Files, scales: Scales, info: TensorInfo) -> None:
        self._files, self._scales, self._info = files, scales, info

    def read(self, start: int, out: Tensor) -> None:
        """Fill the flat `out` (float32) from element `start`."""
        values = torch.empty(len(out), dtype=TORCH_DTYPE[self._info.dtype])
        self._files.read_elements(self._info, start, values)
        out.copy_(values)
        self._scales.multiply(self._info, start, out)


def split(info: TensorInfo, deltas: Sequence[Delta]) -> tuple[TensorInfo, tuple[Delta, ...]]:
    """A tensor and the deltas left to fold; if a delta replaces the tensor, the tensor is the replacement."""
    if not deltas:
        return info, ()
    for number in range(len(deltas) - 1, -1, -1):
        replacement = deltas[number].replacement
        if replacement is not None:
            return replacement._replace(name=info.name), tuple(deltas[number + 1 :])
    return info, tuple(deltas)


def chain(
    files: Files, scales: Scales, info: TensorInfo, deltas: Sequence[Delta], device: torch.device = CPU, skip: int = 0
) -> Chain:
    """Open a tensor's deltas on the tensor."""
    return Chain(files, device, Stored(files, scales, info), deltas, skip)


class Values:
    """The values of a model's tensors, its deltas folded in. One tensor's deltas are open at a time."""

    def __init__(
        self, tensors: Mapping[str, TensorInfo], deltas: Mapping[str, tuple[Delta, ...]], files: Files
    ) -> None:
        self.tensors, self.deltas, self.files = tensors, deltas, files
        self._scales = Scales(files)
        self._open: tuple[str, Chain] | None = None

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat `out` (float32) with elements `start` onwards of a float tensor."""
        self._chain(name).read(start, out)

    def elements(self, name: str, start: int, numel: int) -> Tensor:
        """Elements `start` onwards, flat, in the type of a copy of the model: scaled FP8 becomes bfloat16."""
        info = self.tensors[name]
        stored, deltas = split(info, self.deltas.get(name, ()))
        if not deltas and stored.dtype == info.dtype == stored.copied_dtype:
            values = torch.empty(numel, dtype=TORCH_DTYPE[info.dtype])
            self.files.read_elements(stored, start, values)
            return values
        wide = torch.empty(numel)
        self.read(name, start, wide)
        return wide.to(self.copied_type(name))

    def copied_type(self, name: str) -> torch.dtype:
        """The type that a copy of the model stores a tensor in."""
        return TORCH_DTYPE[self.tensors[name].copied_dtype]

    def whole(self, name: str) -> Tensor:
        """A tensor of the model: a float as float32, any other as stored."""
        info = self.tensors[name]
        if not info.is_float:
            return whole(self.files, info)
        out = torch.empty(info.numel)
        self.read(name, 0, out)
        return out.view(info.shape)

    def _chain(self, name: str) -> Chain:
        if self._open is None or self._open[0] != name:
            info, deltas = split(self.tensors[name], self.deltas.get(name, ()))
            self._open = name, chain(self.files, self._scales, info, deltas)
        return self._open[1]
