"""Tensors concatenated from stored ones: experts that a file holds apart, read as one tensor.

Nothing is written to disk; a chunk is read from the parts it lies in.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from mergebench.checkpoint.files import TORCH_DTYPE, whole
from mergebench.checkpoint.fp8 import Scaler
from mergebench.checkpoint.header import ITEM_SIZE, Reader, TensorInfo


@dataclass(frozen=True, eq=False)
class Stack:
    """The elements of `parts`, one part after the other."""

    parts: tuple[TensorInfo, ...]

    @property
    def own(self) -> TensorInfo:
        return self.parts[0]

    @cached_property
    def dtype(self) -> str:
        """The parts' type if they share one and have no scales, else float32."""
        types = {part.dtype for part in self.parts}
        return types.pop() if len(types) == 1 and not any(part.scale for part in self.parts) else "F32"

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate((part.numel for part in self.parts), initial=0))

    def info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """The tensor as the engine sees it."""
        nbytes = self._starts[-1] * ITEM_SIZE[self.dtype]
        return self.own._replace(name=name, dtype=self.dtype, shape=shape, nbytes=nbytes, scale=None, made=self)

    def digest(self) -> str:
        """A hash of the parts and their order."""
        listed = [(part.name, part.place) for part in self.parts]
        return hashlib.sha256(repr(listed).encode()).hexdigest()

    def settle(self, files: Reader) -> None:
        """Compute where the parts start."""
        _ = self._starts

    def resident(self) -> int:
        """Of its parts, one is read at a time."""
        return max((part.made.resident() for part in self.parts if part.made is not None), default=0)

    def read(self, files: Reader, start: int, out: Tensor) -> None:
        """Fill the flat `out` (of this tensor's type) with elements `start` onwards."""
        at, stop = start, start + len(out)
        number = bisect_right(self._starts, start) - 1
        while at < stop:
            part, begin = self.parts[number], self._starts[number]
            piece = out[at - start : min(begin + part.numel, stop) - start]
            if part.dtype == self.dtype:
                files.read_elements(part, at - begin, piece)
            else:
                stored = torch.empty(len(piece), dtype=TORCH_DTYPE[part.dtype])
                files.read_elements(part, at - begin, stored)
                piece.copy_(stored)
                if part.scale is not None:
                    Scaler(part, whole(files, part.scale.stored)).multiply(at - begin, piece)
            at += len(piece)
            number += 1


def stack(name: str, parts: Sequence[TensorInfo], shape: tuple[int, ...]) -> TensorInfo:
    """One tensor of this shape that concatenates `parts`."""
    return Stack(tuple(parts)).info(name, shape)
