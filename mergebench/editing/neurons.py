"""A matrix as one vector per neuron, as wide as the residual stream.

    torch's Linear                                   [..., neurons, width]   a vector is a row
    GPT-2's Conv1D, and experts of some mixtures     [..., width, neurons]   a vector is a column

If the first dimension is experts, the number of a neuron is expert * neurons + neuron.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mergebench.checkpoint.files import put, write_error
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.values import Values

BLOCK = 1 << 20  # elements read at once


@dataclass(frozen=True)
class Neurons:
    """The layout of the vectors in a tensor."""

    info: TensorInfo
    transposed: bool  # they are columns

    @property
    def width(self) -> int:
        return self.info.shape[-2 if self.transposed else -1]

    @property
    def side(self) -> int:
        """Neurons of one expert; all neurons of a plain matrix."""
        return self.info.shape[-1 if self.transposed else -2]

    @property
    def count(self) -> int:
        return self.info.numel // self.width

    def runs(self, numbers: Tensor) -> Iterator[tuple[int, int, int]]:
        """(place among `numbers`, first, stop) of runs of consecutive neurons; numbers: int64, ascending."""
        if not len(numbers):
            return
        breaks = (numbers.diff() != 1).nonzero().ravel().add_(1).tolist()
        for start, stop in zip([0, *breaks], [*breaks, len(numbers)], strict=True):
            yield start, int(numbers[start]), int(numbers[stop - 1]) + 1

    def stretches(self, numbers: Tensor) -> Iterator[tuple[slice, slice, int, Tensor]]:
        """Of vectors that are columns, a few coordinates at a time: (places among `numbers`, coordinates, the first
        element of the rows that hold them, columns)."""
        step = max(BLOCK // self.side, 1)
        for expert in sorted(set(numbers.div(self.side, rounding_mode="floor").tolist())):
            first = expert * self.side
            low, high = torch.searchsorted(numbers, torch.tensor([first, first + self.side])).tolist()
            for row in range(0, self.width, step):
                rows = slice(row, min(row + step, self.width))
                yield slice(low, high), rows, (expert * self.width + row) * self.side, numbers[low:high] - first


def vectors(values: Values, neurons: Neurons, numbers: Tensor) -> Tensor:
    """[k, width] of the neurons with these numbers (int64, ascending), as a copy of the model stores them."""
    name, width, side = neurons.info.name, neurons.width, neurons.side
    out = torch.empty(len(numbers), width, dtype=values.copied_type(name))
    if not neurons.transposed:
        for at, first, stop in neurons.runs(numbers):
            block = values.elements(name, first * width, (stop - first) * width)
            out[at : at + stop - first] = block.view(-1, width)
        return out
    for places, rows, start, columns in neurons.stretches(numbers):
        block = values.elements(name, start, (rows.stop - rows.start) * side).view(-1, side)
        out[places, rows] = block.T[columns]
    return out


def write_vectors(neurons: Neurons, numbers: Tensor, vectors: Tensor) -> None:
    """Overwrite the vectors with these numbers by vectors [k, width] (of the stored type), in the file itself."""
    info, width, side, item = neurons.info, neurons.width, neurons.side, vectors.element_size()
    try:
        file = os.open(info.file, os.O_RDWR)
        try:
            if not neurons.transposed:
                for at, first, stop in neurons.runs(numbers):
                    raw = vectors[at : at + stop - first].contiguous().view(-1).view(torch.uint8).numpy()
                    put(file, raw.data, info.offset + first * width * item)
                return
            for places, rows, start, columns in neurons.stretches(numbers):
                block = bytearray((rows.stop - rows.start) * side * item)
                os.preadv(file, [block], info.offset + start * item)
                torch.frombuffer(block, dtype=vectors.dtype).view(-1, side)[:, columns] = vectors[places, rows].T
                put(file, memoryview(block), info.offset + start * item)
        finally:
            os.close(file)
    except OSError as error:
        raise write_error(info.file, error) from None
