"""Exact numbers about a whole tensor or a whole model, gathered chunk by chunk.

A statistic has four operations: `init` makes a state, `reduce` adds a chunk to it, `combine` joins two states
(associative, so each thread, process or machine can have a state), and `finish` turns it into the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from mergebench.engine.brackets import BYTES, LEAST_NEW, Bracket, Extreme, Floats, Sample, gather
from mergebench.engine.noise import TILE

if TYPE_CHECKING:  # listing the methods must not wait for torch
    from torch import Tensor

Key = Callable[["Tensor"], "Tensor"]


class Statistic:
    """A question about all of `values` [rows, elements], of which a method sees one chunk."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def init(self, numel: int, tiles: int, sample: Sample | None, room: int) -> Any:
        """An empty state for `numel` elements in `tiles` tiles, of at most `room` bytes."""
        raise NotImplementedError

    def reduce(self, state: Any, tile: int, sizes: Sequence[int] = ()) -> None:
        """Add this chunk, whose first element starts tile number `tile` of the unit.

        sizes: of the tensors in it, if there are several: each starts a tile.
        """
        raise NotImplementedError

    @staticmethod
    def combine(state: Any, other: Any) -> Any:
        raise NotImplementedError

    def finish(self, state: Any) -> Any:
        """The answer; raises `Miss` if another sweep is needed."""
        raise NotImplementedError

    def remarks(self, state: Any, numel: int) -> dict[str, Any]:
        """Further facts from the finished state of `numel` elements, for provenance."""
        return {}

    def at_once(self) -> dict[str, Any]:
        """The encoded answer if this chunk is the whole, of one tile at most, with remarks."""
        numel = self.values.shape[1]
        state = self.init(numel, 1, None, 0)
        self.reduce(state, 0)
        return encode(self.finish(state)) | self.remarks(state, numel)

    def exact(self) -> Any:
        """The answer if this chunk is the whole: the oracle for the streamed answer."""
        numel = self.values.shape[1]
        state = self.init(numel, -(-numel // TILE), None, 0)
        self.reduce(state, 0)
        return self.finish(state)


class Small:
    """All values of a small unit on one worker: the question is answered there and the values freed."""

    def __init__(self, numel: int, ranks: Sequence[Sequence[int]], trim: bool) -> None:
        self.numel, self.ranks, self.trim = numel, ranks, trim
        self.rows = np.empty((0, 0), np.float32)  # the number of filled columns
        self.filled = 0
        self.answers: list[list[float]] = []
        self.kept: list[float] = []

    def add(self, values: Floats) -> None:
        """Take in a chunk [rows, elements]."""
        if not self.filled:
            self.rows = np.empty((len(values), self.numel), np.float32)
        elif not self.rows.flags.writeable:  # received from another process
            self.rows = self.rows.copy()
        self.rows[:, self.filled : self.filled + values.shape[1]] = values
        self.filled += values.shape[1]
        if self.filled < self.numel:
            return
        rows, self.rows = self.rows, np.empty((0, 0), np.float32)
        self.answers, self.kept = _answered(rows, self.ranks, self.trim)

    def merge(self, other: Small) -> None:
        """Add another worker's chunks: some, or all of them."""
        if other.answers:
            self.answers, self.kept = other.answers, other.kept
        elif other.filled:
            self.add(other.rows[:, : other.filled])


Gatherers = list[Bracket | Extreme]  # one for each row


class OrderStatistics(Statistic):
    """The values of given ranks in each row, as if the row were sorted."""

    def __init__(self, values: Tensor, ranks: Sequence[Sequence[int]], key: Key | None, trim: bool) -> None:
        super().__init__(values)
        self.ranks = ranks  # [questions][rows]
        self.key, self.trim = key, trim

    def init(self, numel: int, tiles: int, sample: Sample | None, room: int) -> Small | list[Gatherers]:
        self._check_ranks(numel)
        if sample is None:
            return Small(numel, self.ranks, self.trim)
        brackets = sum(0 < rank < numel - 1 for ranks in self.ranks for rank in ranks)
        share = max(room // (BYTES * max(brackets, 1)), LEAST_NEW)

        def gatherer(row: int, rank: int) -> Bracket | Extreme:
            if rank in (0, numel - 1):
                return Extreme(rank > 0, numel)
            low, guess, high, common = sample.bracket(row, rank, numel)
            return Bracket(low, guess, high, share, common)

        return [[gatherer(row, rank) for row, rank in enumerate(ranks)] for ranks in self.ranks]

    def spread(self, sample: Sample, numel: int) -> float:
        """The mean share of a row that its brackets hold, estimated from a sample."""
        shares = [sample.share(row, rank, numel) for ranks in self.ranks for row, rank in enumerate(ranks)]
        return sum(shares) / len(shares)

    def reduce(self, state: Small | list[Gatherers], tile: int, sizes: Sequence[int] = ()) -> None:
        if isinstance(state, Small):
            state.add(self._keyed().cpu().numpy())
            return
        keyed = self._keyed()
        rows = keyed.numpy() if keyed.device.type == "cpu" else keyed
        for question in state:
            bracketed = [number for number, gatherer in enumerate(question) if isinstance(gatherer, Bracket)]
            if bracketed:
                brackets = [cast(Bracket, question[number]) for number in bracketed]
                gather(brackets, rows if len(bracketed) == len(question) else rows[bracketed])
            for gatherer, row in zip(question, rows, strict=True):
                if isinstance(gatherer, Extreme):
                    gatherer.add(row)

    def _check_ranks(self, numel: int) -> None:
        for ranks in self.ranks:
            for rank in (min(ranks), max(ranks)):
                if not 0 <= rank < numel:
                    raise IndexError(f"rank {rank} of {numel} elements")

    def keyed(self) -> Floats:
        """A copy of the values to be ordered [rows, elements], for a sample."""
        return np.array(self._keyed().cpu().numpy())

    def _keyed(self) -> Tensor:
        return self.values if self.key is None else self.key(self.values)

    def at_once(self) -> dict[str, Any]:
        self._check_ranks(self.values.shape[1])
        answers, kept = _answered(self.keyed(), self.ranks, self.trim)
        return {"order_statistics": answers} | ({"kept": kept} if self.trim else {})

    def exact(self) -> tuple[Tensor, ...]:
        self._check_ranks(self.values.shape[1])
        return pick(self.keyed(), self.ranks)

    @staticmethod
    def combine(state: Small | list[Gatherers], other: Small | list[Gatherers]) -> Small | list[Gatherers]:
        if isinstance(state, Small):
            state.merge(cast(Small, other))
            return state
        for mine, theirs in zip(state, cast("list[Gatherers]", other), strict=True):
            for gatherer, more in zip(mine, theirs, strict=True):
                gatherer.merge(more)  # type: ignore[arg-type]
        return state

    def finish(self, state: Small | list[Gatherers]) -> tuple[Tensor, ...]:
        """One float32 [rows, 1] for each question."""
        if isinstance(state, Small):
            return _columns(state.answers)
        return tuple(
            torch.tensor([[g.at(rank)] for g, rank in zip(question, ranks, strict=True)], dtype=torch.float32)
            for question, ranks in zip(state, self.ranks, strict=True)
        )

    def remarks(self, state: Small | list[Gatherers], numel: int) -> dict[str, Any]:
        """If the answers are the thresholds of a trim, the share of each row between them."""
        if not self.trim:
            return {}
        if isinstance(state, Small):
            return {"kept": state.kept}
        if len(state) == 1:
            return {"kept": [1 - low.smaller / numel for low in state[0]]}
        low_and_high = zip(*state, strict=True)
        return {"kept": [max(high.upto - low.smaller, 0) / numel for low, high in low_and_high]}


def pick(rows: Floats, ranks: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """The values of ranks [questions][rows] when all values are in memory; reorders the rows."""
    return _columns(_pick(rows, ranks))


def _pick(rows: Floats, ranks: Sequence[Sequence[int]]) -> list[list[float]]:
    if all(len(set(wanted)) == 1 for wanted in ranks):  # the same for all rows
        rows.partition(sorted({wanted[0] for wanted in ranks}), axis=1)
        return [
            (rows[:, wanted[0]] + np.float32(0)).tolist() for wanted in ranks
        ]  # turns -0.0 into 0.0, for equal bits
    columns: list[list[float]] = [[] for _ in ranks]
    for row, each in zip(rows, zip(*ranks, strict=True), strict=True):
        row.partition(sorted(set(each)))
        for column, rank in zip(columns, each, strict=True):
            column.append(float(row[rank]) + 0.0)
    return columns


def _answered(rows: Floats, ranks: Sequence[Sequence[int]], trim: bool) -> tuple[list[list[float]], list[float]]:
    """The values of ranks [questions][rows]; if they trim, also the share of each row that is kept. Reorders the
    rows."""
    answers = _pick(rows, ranks)
    if not trim:
        return answers, []
    inside = rows >= np.array(answers[0], np.float32)[:, None]
    if len(answers) > 1:
        inside &= rows <= np.array(answers[1], np.float32)[:, None]
    return answers, (np.count_nonzero(inside, axis=1) / rows.shape[1]).tolist()


def _columns(answers: Sequence[Sequence[float]]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(answer, dtype=torch.float32).unsqueeze(1) for answer in answers)


class Gram(Statistic):
    """The dot products of all pairs of rows: float64 sums over fixed tiles, added in tile order."""

    def init(self, numel: int, tiles: int, sample: Sample | None, room: int) -> NDArray[np.float64]:
        return np.zeros((tiles, len(self.values), len(self.values)))

    def reduce(self, state: NDArray[np.float64], tile: int, sizes: Sequence[int] = ()) -> None:
        for number, block in enumerate(self._tiles(sizes), tile):
            state[number] = self._sum(block).cpu().numpy()

    def _tiles(self, sizes: Sequence[int]) -> Iterator[Tensor]:
        """The chunk's tiles in float64 [rows, elements]."""
        for part in torch.split(self.values, list(sizes), dim=1) if sizes else [self.values]:
            for start in range(0, part.shape[1], TILE):
                yield part[:, start : start + TILE].double()

    def _sum(self, block: Tensor) -> Tensor:
        return block @ block.T

    @staticmethod
    def combine(state: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
        return state + other  # only one state has a tile; in the others it is zero

    def finish(self, state: NDArray[np.float64]) -> Tensor:
        """float64, summed over the tiles."""
        return torch.from_numpy(np.add.accumulate(state, axis=0)[-1].copy())


class Norms(Gram):
    """The L1 norms of the rows over all merged tensors, at any scope; summed like dot products."""

    def init(self, numel: int, tiles: int, sample: Sample | None, room: int) -> NDArray[np.float64]:
        return np.zeros((tiles, len(self.values)))

    def _sum(self, block: Tensor) -> Tensor:
        return block.abs_().sum(1)

    @staticmethod
    def of_all(answers: Sequence[Tensor]) -> Tensor:
        """Combine the answers about all units into one, in any order."""
        return torch.tensor([math.fsum(row.tolist()) for row in torch.stack(list(answers), dim=1)], dtype=torch.float64)


def order_statistics(
    values: Tensor, ranks: Sequence[int | Sequence[int]], key: Key | None = None, trim: bool = False
) -> OrderStatistics:
    """Ask for the values of `ranks` (0 is the smallest) in each row of `values` [models, elements].

    A rank is one integer for all models or one for each. `key` is applied first, elementwise, as in `sorted`; so a
    method that needs magnitudes only for the question does not compute them in the last sweep. `trim` says that values
    at or above the first answer are kept (and at or below the second, if there is one). With equal values this keeps
    more than the rank says; provenance records the share. The answer is one [models, 1] for each rank.
    """
    rows = values.shape[0]
    each = [[rank] * rows if isinstance(rank, int) else list(rank) for rank in ranks]
    return OrderStatistics(values, each, key, trim)


def gram(values: Tensor) -> Gram:
    """Ask for the dot products of all pairs of rows; the answer is float64 [rows, rows]."""
    return Gram(values)


def norms(values: Tensor) -> Norms:
    """Ask for the L1 norms of the rows over all tensors, at either scope; float64 [rows]. Must be the last question."""
    return Norms(values)


def encode(answer: Any) -> dict[str, Any]:
    """An answer as plain numbers, which JSON and other processes take."""
    if isinstance(answer, tuple):
        return {"order_statistics": [part.reshape(-1).tolist() for part in answer]}
    return {"gram" if answer.dim() == 2 else "norms": answer.tolist()}


def decode(answer: Mapping[str, Any], device: torch.device | None = None) -> Any:
    """The answer that a method receives, for chunks on a device."""
    for kind in ("gram", "norms"):
        if kind in answer:
            return torch.tensor(answer[kind], dtype=torch.float64)
    ordered = answer["order_statistics"]
    return tuple(torch.tensor(part, dtype=torch.float32, device=device).unsqueeze(1) for part in ordered)
