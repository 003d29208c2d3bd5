"""Exact order statistics in one sweep.

A sample, drawn before the sweep, gives a narrow bracket around the rank. The sweep counts the values below the bracket
and keeps the distinct values inside with their counts. If the bracket missed (the counts show it), the engine sweeps
again with a wider bracket: a miss costs time, never a wrong answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:  # listing the methods must not wait for torch
    from torch import Tensor

Floats = NDArray[np.float32]
Counts = NDArray[np.int64]
LEAST_NEW, MOST_NEW = 1 << 13, 1 << 18  # values that a bracket gathers before it counts distinct values
BYTES = 12  # for a distinct value and its count
COMMON = 3  # the most values that a bracket counts separately
Z = 4.0  # half-width of a bracket in standard errors of the sample


class Miss(Exception):
    """The bracket did not hold the rank: sweep again with a wider one."""


class Sample:
    """Values of a statistic at sampled pieces, spread evenly over all elements."""

    def __init__(self, values: Floats, piece: int, margin: float) -> None:
        """values: [rows, pieces * piece], the pieces in order of their place."""
        self.values, self.piece, self.margin = values, piece, margin
        self._ordered = np.sort(values, axis=1)

    def bracket(self, row: int, rank: int, numel: int) -> tuple[float, float, float, tuple[float, ...]]:
        """(low, guess, high, common): the value of `rank` among `numel` elements is very likely in [low, high).

        common: values in the bracket that many elements have.
        """
        ordered, (first, guess, last) = self._ordered[row], self._places(row, rank, numel)
        low = float(ordered[first]) if first >= 0 else -np.inf
        high = _next(float(ordered[last])) if last < len(ordered) else np.inf
        found, counts = np.unique(ordered[(ordered >= low) & (ordered < high)], return_counts=True)
        most = np.argsort(-counts, kind="stable")[:COMMON]
        return low, guess, high, tuple(found[most][counts[most] > len(ordered) / 256].tolist())

    def share(self, row: int, rank: int, numel: int) -> float:
        """The estimated share of elements in the bracket, without those equal to the guess."""
        ordered, (first, guess, last) = self._ordered[row], self._places(row, rank, numel)
        inside = ordered[max(first, 0) : last + 1]
        return float(np.count_nonzero(inside != guess)) / len(ordered)

    def _places(self, row: int, rank: int, numel: int) -> tuple[int, float, int]:
        """(start, guess, end): places of the bracket's ends in the ordered sample, maybe outside it; the guessed
        value."""
        values, ordered = self.values[row], self._ordered[row]
        size, share = len(ordered), rank / max(numel - 1, 1)
        guess = ordered[min(size - 1, round(share * (size - 1)))]
        # The standard error of the share below `guess`, from differences of neighbouring pieces: pieces
        # are a systematic sample, and a tensor's neighbours are more alike than the model's tensors.
        below = (values.reshape(-1, self.piece) < guess).mean(axis=1)
        error = float(np.sqrt(np.square(np.diff(below)).sum() / 2) / len(below)) if len(below) > 1 else 1.0
        width = self.margin * (Z * error * size + 16)
        return int(share * size - width), float(guess), int(share * size + width) + 1


def _next(value: float) -> float:
    """The smallest float32 above `value`."""
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


class Bracket:
    """Counts the values below `low`, and keeps the distinct values in [low, high) with their counts.

    There are few float32 numbers in a narrow bracket, so this hardly grows with the model. `common` values are counted
    chunk by chunk and never gathered, so that many equal values (exact zeros, differences of bfloat16 numbers) take
    little time. If there are more than `room` distinct values, the values nearest `guess` are kept.
    """

    def __init__(self, low: float, guess: float, high: float, room: int, common: Sequence[float] = ()) -> None:
        self.low, self.guess, self.high, self.room = low, guess, high, room
        self.below = 0
        self.values, self.counts = np.empty(0, np.float32), np.empty(0, np.int64)  # distinct, ascending
        self.common, self._came = tuple(common), np.zeros(len(common), np.int64)
        self._new, self._filled = np.empty(0, np.float32), 0  # not counted yet
        self.smaller = self.upto = 0  # number of values smaller than the answer, and of values not larger

    def add(self, values: Floats | Tensor) -> None:
        """Take in values [elements]."""
        gather([self], values[None])

    def take(self, below: int, common: Sequence[int], inside: Floats) -> None:
        """Add a chunk: the number of values below the bracket, the counts of common values, and the other values
        inside."""
        self.below += below
        self._came = self._came + np.array(common[: len(self.common)], np.int64)
        while len(inside):
            if self._filled == len(self._new):
                self.count()
                self._new = np.empty(min(max(len(self.values), LEAST_NEW), MOST_NEW), np.float32)
            part = inside[: len(self._new) - self._filled]
            self._new[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            inside = inside[len(part) :]

    def count(self) -> None:
        """Bring `values` and `counts` up to date."""
        if self._filled:
            self._add(*np.unique(self._new[: self._filled], return_counts=True))
            self._filled = 0
        if self._came.any():
            self._add(np.array(self.common, np.float32)[self._came > 0], self._came[self._came > 0])
            self._came = np.zeros_like(self._came)
        if len(self.values) > self.room:
            self._shrink()
        self.narrow(self.low, self.high)  # drop values picked before the edges moved

    def _add(self, values: Floats, counts: Counts) -> None:
        both = np.union1d(self.values, values)
        total = np.zeros(len(both), np.int64)
        total[np.searchsorted(both, self.values)] += self.counts
        total[np.searchsorted(both, values)] += counts
        self.values, self.counts = both, total

    def _shrink(self) -> None:
        """Out of room: move the edges so that the half nearest the guess stays."""
        at = int(np.searchsorted(self.values, self.guess))
        first, last = at - self.room // 4, at + self.room // 4
        self.low = float(self.values[first]) if first >= 0 else self.low
        self.high = _next(float(self.values[last])) if last < len(self.values) else self.high

    def narrow(self, low: float, high: float) -> None:
        """Move the edges inwards; values that fall below are counted as below."""
        self.low, self.high = low, high
        first, last = np.searchsorted(self.values, np.array([low, high], np.float32)).tolist()
        self.below += int(self.counts[:first].sum())
        self.values, self.counts = self.values[first:last], self.counts[first:last]

    def __getstate__(self) -> dict[str, Any]:
        """The state sent to another process, without spare room."""
        self.count()
        return self.__dict__ | {"_new": self._new[:0]}

    def merge(self, other: Bracket) -> None:
        """Add another worker's values, within the narrower of both brackets."""
        self.count()
        other.count()
        low, high = max(self.low, other.low), min(self.high, other.high)
        self.narrow(low, high)
        other.narrow(low, high)
        self.below += other.below
        self._add(other.values, other.counts)

    def at(self, rank: int) -> float:
        """The value of that rank (0 is the smallest)."""
        self.count()
        ends = self.below + np.cumsum(self.counts)
        place = int(np.searchsorted(ends, rank, side="right"))
        if rank < self.below or place == len(ends):
            raise Miss
        self.upto = int(ends[place])
        self.smaller = self.upto - int(self.counts[place])
        return float(self.values[place]) + 0.0  # turns -0.0 into 0.0, for equal bits


def gather(brackets: Sequence[Bracket], rows: Floats | Tensor) -> None:
    """Give each bracket its row of a chunk [brackets, elements].

    NumPy is fastest at comparing and counting, so picking is done last, on few values. All rows share each comparison,
    because threads wait for one another at every call.
    """
    most = max(len(bracket.common) for bracket in brackets)
    edges = [[bracket.low, bracket.high, *bracket.common] for bracket in brackets]
    edges = [row + [np.nan] * (2 + most - len(row)) for row in edges]  # no value equals NaN
    if isinstance(rows, torch.Tensor):
        low, high, *common = torch.tensor(edges, dtype=rows.dtype, device=rows.device).T.unsqueeze(2)
    else:
        low, high, *common = np.array(edges, rows.dtype).T[:, :, None]
    inside = rows >= low
    left = [_counts(inside)]  # counts from `low` upwards, then in the bracket, then without each common value
    inside &= rows < high
    for value in common:
        left.append(_counts(inside))
        inside &= rows != value
    for bracket, row, mask, (upwards, *counts) in zip(brackets, rows, inside, zip(*left, strict=True), strict=True):
        picked = row[mask].cpu().numpy() if isinstance(row, torch.Tensor) else row.compress(mask)
        came = [a - b for a, b in itertools.pairwise([*counts, len(picked)])]
        bracket.take(len(row) - upwards, came, picked)


class Extreme:
    """The smallest or the largest of `numel` values: no bracket needed."""

    def __init__(self, largest: bool, numel: int) -> None:
        self.largest, self.numel = largest, numel
        self.value = -np.inf if largest else np.inf
        self.count = 0  # number of values equal to it

    @property
    def smaller(self) -> int:
        return self.numel - self.count if self.largest else 0

    @property
    def upto(self) -> int:
        return self.numel if self.largest else self.count

    def add(self, values: Floats | Tensor) -> None:
        if len(values):
            found = float(values.max() if self.largest else values.min())
            if not self._beyond(found):
                self._take(found, int((values == found).sum()))

    def merge(self, other: Extreme) -> None:
        if not self._beyond(other.value):
            self._take(other.value, other.count)

    def _beyond(self, value: float) -> bool:
        """Whether the value so far lies beyond another."""
        return self.value > value if self.largest else self.value < value

    def _take(self, value: float, count: int) -> None:
        self.count = count + (self.count if value == self.value else 0)
        self.value = value

    def at(self, rank: int) -> float:
        return self.value


def _counts(mask: NDArray[np.bool_] | Tensor) -> list[int]:
    """The number of true values in each row."""
    if isinstance(mask, torch.Tensor):
        return cast("list[int]", mask.sum(dim=1).tolist())
    return [int(np.count_nonzero(row)) for row in mask]
