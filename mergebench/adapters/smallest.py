"""The positions of the k smallest keys, in one tensor or in all tensors of a model, exactly.

Keys are int32 and not negative: the bits of a float's magnitude, which are ordered as the magnitudes are, or random
ones. Of equal keys, the one at the lower position goes first; tensors count in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergebench.errors import ModelError

LONGEST = 1 << 31  # elements of a tensor whose positions are int32
TOP = 0x7FFFFFFF
LOW = 15  # bits of a key that the second histogram sorts; the first one sorts the others

Keys = Any  # an int32 array of NumPy, which compares and counts faster than torch


def check_length(name: str, numel: int) -> None:
    """`ModelError` if a tensor has more elements than int32 positions can name."""
    if numel >= LONGEST:
        raise ModelError(f"{name}: it has more elements than int32 positions can name")


def magnitude_keys(values: Tensor, largest: bool = False) -> Keys:
    """Keys that order flat float32 values by magnitude: the smallest first, or the largest."""
    keys = values.numpy().view(np.int32) & TOP
    return TOP - keys if largest else keys


def smallest(keys: Keys, count: int) -> Tensor:
    """The positions of the `count` smallest keys, ascending, int32."""
    if count == 0:
        return torch.empty(0, dtype=torch.int32)
    threshold = int(np.partition(keys, count - 1)[count - 1])
    return _take(keys, threshold, count - int((keys < threshold).sum()))


def _take(keys: Keys, threshold: int, ties: int) -> Tensor:
    """The positions of the keys below `threshold` and of the first `ties` of those equal to it."""
    chosen = keys < threshold
    chosen[np.flatnonzero(keys == threshold)[:ties]] = True
    return torch.from_numpy(np.flatnonzero(chosen).astype(np.int32))


class Ranking:
    """The `count` smallest keys over several tensors, with no more than a piece of one in memory.

    Two histograms, of the keys' high bits and of the low bits at the threshold, give the `count`-th key exactly.

    names: of the tensors, in order. keys: the keys of a tensor, piece by piece. Raises `ValueError` if there are fewer
    than `count` keys, or `count` is no positive number.
    """

    reads = 4  # of every key, when the positions in all tensors have been taken

    def __init__(self, names: Iterable[str], keys: Callable[[str], Iterator[Keys]], count: int) -> None:
        self._names, self._keys = list(names), keys
        high, before = self._bin(lambda piece: piece >> LOW, 1 << (31 - LOW), count)
        low, below = self._bin(lambda piece: piece[piece >> LOW == high] & ((1 << LOW) - 1), 1 << LOW, count - before)
        self._threshold, left = high << LOW | low, count - before - below
        self.counts: dict[str, int] = {}  # of chosen positions by tensor
        self._ties: dict[str, int] = {}
        for name in self._names:
            less = equal = 0
            for piece in keys(name):
                less += int((piece < self._threshold).sum())
                equal += int((piece == self._threshold).sum())
            self._ties[name] = min(equal, left)
            left -= self._ties[name]
            self.counts[name] = less + self._ties[name]

    def _bin(self, part: Callable[[Keys], Keys], bins: int, count: int) -> tuple[int, int]:
        """The bin that holds the `count`-th of the parts, and how many are in the bins before it."""
        histogram = np.zeros(bins, np.int64)
        for name in self._names:
            for piece in self._keys(name):
                histogram += np.bincount(part(piece), minlength=bins)
        sums = histogram.cumsum()
        if not 0 < count <= sums[-1]:
            raise ValueError(f"{count} of {sums[-1]}")
        found = int(np.searchsorted(sums, count))
        return found, int(sums[found] - histogram[found])

    def positions(self, name: str) -> Tensor:
        """The chosen positions in a tensor, ascending, int32."""
        start, ties, found = 0, self._ties[name], []
        for piece in self._keys(name):
            found.append(_take(piece, self._threshold, ties) + start)
            ties = max(ties - int((piece == self._threshold).sum()), 0)
            start += len(piece)
        return torch.cat(found)
