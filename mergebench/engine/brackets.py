"""Exact order statistics in one sweep.

A sample, drawn before it, gives a narrow bracket around the rank; the sweep counts what lies below and
keeps what lies inside. Where the bracket missed (which the counts show), the engine sweeps again with a
wider one: a miss costs time, never a wrong answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
FIRST_BLOCK, BLOCK = 1 << 13, 1 << 18  # values of the first block that a bracket keeps, and of a later one at most
COMMON = 3  # values that a bracket counts by themselves, at most
Z = 4.5  # half-width of a bracket in standard errors of the sample


class Miss(Exception):
    """The bracket did not hold the rank: sweep again with a wider one."""


class Sample:
    """Values of a statistic at a sample of pieces spread evenly over all elements."""

    def __init__(self, values: Floats, piece: int, margin: float) -> None:
        """values: [rows, pieces * piece], the pieces in order of their place."""
        self.values, self.piece, self.margin = values, piece, margin

    def bracket(self, row: int, rank: int, numel: int) -> tuple[float, float, float, tuple[float, ...]]:
        """(low, guess, high, common): the value of `rank` among `numel` elements is very likely in [low, high).

        common: the values there that many elements have.
        """
        values = self.values[row]
        ordered = np.sort(values)
        size, share = len(ordered), rank / max(numel - 1, 1)
        guess = ordered[min(size - 1, round(share * (size - 1)))]
        # The standard error of the share below `guess`, from differences of neighbouring pieces: pieces
        # are a systematic sample, and a tensor's neighbours are more alike than the model's tensors.
        below = (values.reshape(-1, self.piece) < guess).mean(axis=1)
        error = float(np.sqrt(np.square(np.diff(below)).sum() / 2) / len(below)) if len(below) > 1 else 1.0
        width = self.margin * (Z * error * size + 16)
        first, last = int(share * size - width), int(share * size + width) + 1
        low = float(ordered[first]) if first >= 0 else -np.inf
        high = _next(float(ordered[last])) if last < size else np.inf
        found, counts = np.unique(ordered[(ordered >= low) & (ordered < high)], return_counts=True)
        most = np.argsort(-counts, kind="stable")[:COMMON]
        return low, float(guess), high, tuple(found[most][counts[most] > size / 256].tolist())


def _next(value: float) -> float:
    """The smallest float32 above `value`."""
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


class Bracket:
    """Counts the values below `low`, keeps those in [low, high); of `common` values there it keeps counts only.

    So a flood (exact zeros, differences of bfloat16 numbers) takes no room and little time. `guess` is where
    to hold on when room gets short.
    """

    def __init__(self, low: float, guess: float, high: float, room: int, common: Sequence[float] = ()) -> None:
        self.low, self.guess, self.high, self.room = low, guess, high, room
        self.common = dict.fromkeys(common, 0)
        self.below = self.held = 0
        self._full: list[Floats] = []
        self._block, self._filled = np.empty(0, np.float32), 0
        self.smaller: int | None = None  # how many values are smaller than the answer

    def add(self, values: Floats | Tensor) -> None:
        """Take in values [elements]."""
        gather([self], values[None])

    def take(self, below: int, common: Sequence[int], inside: Floats) -> None:
        """Take in what of a chunk lies below the bracket, how often each common value came, and the rest inside."""
        self.below += below
        for value, count in zip(self.common, common, strict=False):
            self.common[value] += count
        self._keep(inside)
        if self.held > self.room:
            self._shrink()

    def _keep(self, values: Floats) -> None:
        # Into blocks that are never copied to grow: what they left behind would stay with the process. And
        # not each chunk's values by themselves: thousands of small blocks that live long would split the
        # memory which the chunks' temporaries use again and again.
        self.held += len(values)
        while len(values):
            if self._filled == len(self._block):
                self._full.append(self._block)
                size = min(max(2 * len(self._block), FIRST_BLOCK), BLOCK)
                self._block, self._filled = np.empty(size, np.float32), 0
            part = values[: len(self._block) - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            values = values[len(part) :]

    def inside(self) -> Floats:
        """The values kept, in any order."""
        return np.concatenate([*self._full, self._block[: self._filled]])

    def _shrink(self) -> None:
        """Out of room: keep the half nearest the guess, count the rest."""
        ordered = np.sort(self.inside())
        at = int(np.searchsorted(ordered, self.guess))
        first, last = at - self.room // 4, at + self.room // 4
        low = float(ordered[first]) if first >= 0 else self.low
        high = _next(float(ordered[last])) if last < ordered.size else self.high
        self.narrow(low, high)

    def narrow(self, low: float, high: float) -> None:
        """Move the edges inwards (the guess stays inside); what falls out below is counted."""
        if (low, high) == (self.low, self.high):
            return
        for value, count in self.common.items():
            if not low <= value < high:
                self.below += count if value < low else 0
                self.common[value] = 0
        values = self.inside()
        self.below += int(np.count_nonzero(values < low))
        values = values[(values >= low) & (values < high)]
        self.low, self.high, self.held = low, high, values.size
        self._full, self._block, self._filled = [], values, values.size

    def __getstate__(self) -> dict[str, object]:
        """What is sent to another process: not the room for more."""
        return self.__dict__ | {"_block": self._block[: self._filled]}

    def merge(self, other: Bracket) -> None:
        """Take in what another worker gathered, within the narrower of both brackets."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        self.narrow(low, high)
        other.narrow(low, high)
        self.below += other.below
        for value, count in other.common.items():
            self.common[value] += count
        self._full += [*other._full, other._block[: other._filled]]
        self.held += other.held
        if self.held > 2 * self.room:
            self._shrink()

    def at(self, rank: int) -> float:
        """The value of that rank (0 is the smallest)."""
        inside, place = self.inside(), rank - self.below
        if not 0 <= place < inside.size + sum(self.common.values()):
            raise Miss
        passed, answer = 0, None  # common values smaller than the answer
        for value, count in sorted(self.common.items()):
            start = passed + int(np.count_nonzero(inside < value))
            if place < start:
                break
            if place < start + count:
                answer = value
                break
            passed += count
        if answer is None:
            answer = float(np.partition(inside, place - passed)[place - passed])
        self.smaller = self.below + passed + int(np.count_nonzero(inside < answer))
        return answer


def gather(brackets: Sequence[Bracket], rows: Floats | Tensor) -> None:
    """Give each bracket its row of a chunk [brackets, elements].

    Comparing and counting is the cheapest that NumPy does; picking is done last, of few. All rows go
    through each comparison together: threads wait for one another at every call, not at every element.
    """
    most = max(len(bracket.common) for bracket in brackets)
    edges = [[bracket.low, bracket.high, *bracket.common] for bracket in brackets]
    edges = [row + [np.nan] * (2 + most - len(row)) for row in edges]  # no value equals NaN
    if isinstance(rows, Tensor):
        low, high, *common = torch.tensor(edges, dtype=rows.dtype, device=rows.device).T.unsqueeze(2)
    else:
        low, high, *common = np.array(edges, rows.dtype).T[:, :, None]
    inside = rows >= low
    left = [_counts(inside)]  # how many are from `low` upwards, then in the bracket, then without each common value
    inside &= rows < high
    left.append(_counts(inside))
    for value in common:
        inside &= rows != value
        left.append(_counts(inside))
    for bracket, row, mask, counts in zip(brackets, rows, inside, zip(*left, strict=True), strict=True):
        picked = row[mask].cpu().numpy() if isinstance(row, Tensor) else row.compress(mask)
        bracket.take(len(row) - counts[0], [a - b for a, b in itertools.pairwise(counts[1:])], picked)


class Extreme:
    """The smallest or the largest of `numel` values: no bracket needed."""

    def __init__(self, largest: bool, numel: int) -> None:
        self.largest, self.numel = largest, numel
        self.value = -np.inf if largest else np.inf
        self.count = 0  # of values equal to it

    @property
    def smaller(self) -> int:
        return self.numel - self.count if self.largest else 0

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
    """How many are true in each row."""
    if isinstance(mask, Tensor):
        return cast("list[int]", mask.sum(dim=1).tolist())
    return [int(np.count_nonzero(row)) for row in mask]
