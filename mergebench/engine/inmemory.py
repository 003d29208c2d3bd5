"""A merge result in memory instead of files, to be measured, or read again as a task vector."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergebench.checkpoint.files import TORCH_DTYPE
from mergebench.checkpoint.header import Reader, TensorInfo
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.shards import ALIGN, Shard


class InMemory:
    """The tensors of an output; several merges may be written into it one after another.

    The memory is shared with processes forked later, so that threads and processes can fill it.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        tensors = [tensor for shard in shards for tensor in shard.tensors]
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += tensor.nbytes + -tensor.nbytes % ALIGN
        whole = torch.frombuffer(mmap.mmap(-1, max(end, 1)), dtype=torch.uint8)
        self.tensors: dict[str, Tensor] = {}
        self._flat: dict[str, Tensor] = {}
        for tensor, start in zip(tensors, starts, strict=True):
            flat = whole[start : start + tensor.nbytes].view(TORCH_DTYPE[tensor.dtype])
            self._flat[tensor.name], self.tensors[tensor.name] = flat, flat.view(tensor.shape)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Put the flat `values` (of the stored dtype) at element `start` of a tensor."""
        self._flat[name][start : start + len(values)] = values

    def write_all(self, tensors: Sequence[tuple[str, int]], values: Tensor) -> None:
        """Put the flat `values` into whole tensors, given with their sizes, one after another."""
        for (name, _), part in zip(tensors, torch.split(values, [numel for _, numel in tensors]), strict=True):
            self._flat[name][:] = part

    def close(self) -> None:
        """Does nothing: no file is open."""

    def task_vector(self, shards: Sequence[Shard], reference: str, base: Model) -> Model:
        """The tensors as a model for the engine: differences to `base`."""
        tensors = {}
        for tensor in (tensor for shard in shards for tensor in shard.tensors):
            info = TensorInfo(tensor.name, tensor.dtype, tensor.shape, Path(), 0, tensor.nbytes)
            tensors[tensor.name] = info._replace(made=_Held(info, self._flat[tensor.name]))
        return Model(reference, base.directory, base.headers, tensors, is_task_vector=True)


@dataclass(frozen=True, eq=False)
class _Held:
    """A tensor that no file holds."""

    own: TensorInfo
    flat: Tensor

    def read(self, files: Reader, start: int, out: Tensor) -> None:
        out.copy_(self.flat[start : start + len(out)])

    def resident(self) -> int:
        return 0

    def settle(self, files: Reader) -> None:
        """Does nothing: the tensor is in memory."""

    def digest(self) -> str:
        raise TypeError("what lies in memory is no input of a result on disk")
