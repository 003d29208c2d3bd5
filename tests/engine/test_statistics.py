"""Order statistics against sorting, dot products against float64, whatever the chunks, samples and room.

python -m pytest tests/engine
"""

from __future__ import annotations

import math
import pickle
from contextlib import suppress
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mergebench.engine import brackets
from mergebench.engine.brackets import Bracket, Extreme, Miss, Sample, _next, gather
from mergebench.engine.noise import TILE
from mergebench.engine.statistics import gram, order_statistics

FLOATS = hnp.arrays(
    np.float32,
    st.integers(1, 400),
    elements=st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5]),  # floods of ties
        st.integers(-30, 30).map(float),
        st.floats(-4, 4, width=32),
    ),
)


def gathered(
    values: np.ndarray, bracket: tuple[float, float, float], room: int, workers: int, cuts: int, common: list[float]
) -> Bracket:
    """Values streamed through several workers' brackets, in pieces, then combined."""
    states = [Bracket(*bracket, room, common) for _ in range(workers)]
    for number, part in enumerate(np.array_split(values, cuts)):
        states[number % workers].add(part)
    for other in states[1:]:
        states[0].merge(other)
    return states[0]


@settings(max_examples=300, deadline=None)
@given(FLOATS, st.data())
def test_a_bracket_is_exact_or_says_that_it_missed(values: np.ndarray, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(values) - 1))
    edges = sorted(data.draw(st.tuples(*[st.sampled_from(values.tolist())] * 3)))
    bracket = (edges[0], edges[1], _next(edges[2]))
    room = data.draw(st.sampled_from([4, 16, 40, 1000]))
    common = data.draw(st.lists(st.sampled_from(values.tolist()), unique=True, max_size=3))

    workers, cuts, gathered_first = data.draw(
        st.tuples(st.integers(1, 3), st.integers(1, 7), st.sampled_from([3, 8192]))
    )

    with mock.patch.object(brackets, "LEAST_NEW", gathered_first):
        found = gathered(values, bracket, room, workers, cuts, common)

    expected = np.sort(values)[rank]
    try:
        assert expected == found.at(rank)
        assert (found.smaller, found.upto) == (
            np.count_nonzero(values < expected),
            np.count_nonzero(values <= expected),
        )
    except Miss:
        inside = edges[0] <= expected <= edges[2]
        assert not inside or room < len(values)  # only a value outside, or one that had to make room, is missed


@settings(max_examples=100, deadline=None)
@given(FLOATS, st.integers(1, 7), st.integers(1, 3), st.booleans())
def test_extremes(values: np.ndarray, cuts: int, workers: int, largest: bool) -> None:
    extremes = [Extreme(largest, len(values)) for _ in range(workers)]
    for number, part in enumerate(np.array_split(values, cuts)):
        extremes[number % workers].add(part)
    for other in extremes[1:]:
        extremes[0].merge(other)

    expected = values.max() if largest else values.min()
    assert extremes[0].at(0) == expected
    assert extremes[0].smaller == np.count_nonzero(values < expected)
    assert extremes[0].upto == np.count_nonzero(values <= expected)


@settings(max_examples=100, deadline=None)
@given(FLOATS, st.integers(1, 7), st.integers(1, 3))
def test_without_a_sample_everything_is_kept_and_exact(values: np.ndarray, cuts: int, workers: int) -> None:
    found = gathered(values, (-np.inf, 0.0, np.inf), len(values), workers, cuts, [])

    assert np.sort(values).tolist() == [found.at(rank) for rank in range(len(values))]


def test_a_bracket_never_holds_more_than_its_room() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    bracket = Bracket(-np.inf, 0.0, np.inf, 1000)
    for part in np.array_split(values, 200):
        bracket.add(part)
        bracket.count()
        assert len(bracket.values) <= 1000

    assert np.sort(values)[50_000] == bracket.at(50_000) or abs(np.sort(values)[50_000]) > bracket.high


def test_a_value_that_comes_often_is_held_once() -> None:
    values = np.random.default_rng(3).integers(0, 50, 3_000_000).astype(np.float32)
    bracket = Bracket(-np.inf, 0.0, np.inf, 1000)
    for part in np.array_split(values, 30):
        bracket.add(part)

    sent = pickle.dumps(bracket)
    assert len(sent) < 5000
    assert [np.sort(values)[rank] for rank in (0, 700_000, 2_999_999)] == [
        pickle.loads(sent).at(rank) for rank in (0, 700_000, 2_999_999)
    ]


def test_both_zeros_are_one_value() -> None:
    for values in ([-0.0, 0.0], [0.0, -0.0], [-0.0, -0.0]):
        bracket = Bracket(-1.0, 0.0, 1.0, 1000)
        bracket.add(np.array(values, np.float32))
        assert [1.0, 1.0] == [math.copysign(1, bracket.at(rank)) for rank in (0, 1)]


def test_a_flood_takes_no_room() -> None:
    values = np.zeros(100_000, np.float32)
    values[:10] = 1
    bracket = Bracket(-1.0, 0.0, 2.0, 1000, [0.0])
    bracket.add(values)

    assert bracket.at(5) == 0.0
    assert bracket.at(99_995) == 1.0


def test_rows_gather_together_what_they_gather_alone() -> None:
    generator = np.random.default_rng(2)
    rows = generator.integers(0, 9, (3, 5000)).astype(np.float32)
    edges = [(2.0, 3.0, 6.0, []), (1.0, 4.0, 5.0, [4.0]), (0.0, 0.0, 9.0, [8.0, 0.0, 3.0])]
    together = [Bracket(low, guess, high, 5000, common) for low, guess, high, common in edges]
    alone = [Bracket(low, guess, high, 5000, common) for low, guess, high, common in edges]
    gather(together, rows)
    for bracket, row in zip(alone, rows, strict=True):
        bracket.add(row)

    for left, right, row in zip(together, alone, rows, strict=True):
        assert np.sort(row)[2300] == left.at(2300) == right.at(2300)
        assert left.below == right.below == np.count_nonzero(row < left.low)
        inside = np.unique(row[(row >= left.low) & (row < left.high)], return_counts=True)
        for bracket in (left, right):
            assert np.array_equal(inside, (bracket.values, bracket.counts))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.999])
def test_a_sample_brackets_the_rank_of_what_it_was_drawn_from(share: float) -> None:
    generator = np.random.default_rng(1)
    values = np.abs(generator.standard_normal(1_000_000)).astype(np.float32)
    starts = np.sort(generator.choice(len(values) - 128, 200, replace=False))
    sample = np.concatenate([values[start : start + 128] for start in starts])[None]
    rank = int(share * (len(values) - 1))

    low, _, high, _ = Sample(sample, 128, 1.0).bracket(0, rank, len(values))

    assert low <= np.sort(values)[rank] < high
    assert np.count_nonzero((values >= low) & (values < high)) < 0.1 * len(values)


def test_ranks_outside_are_refused() -> None:
    statistic = order_statistics(torch.ones(1, 5), [5])
    with pytest.raises(IndexError, match="rank 5 of 5"):
        statistic.exact()


@settings(max_examples=50, deadline=None)
@given(FLOATS)
def test_order_statistics_of_a_whole_equal_sorting(values: np.ndarray) -> None:
    rows = torch.from_numpy(np.stack([values, -values]))
    ranks = sorted({0, len(values) // 3, len(values) - 1})

    answers = order_statistics(rows, ranks).exact()

    ordered = rows.sort(dim=1).values
    for rank, answer in zip(ranks, answers, strict=True):
        assert torch.equal(ordered[:, rank : rank + 1], answer)


@pytest.mark.parametrize("chunk", [TILE, 2 * TILE, 5 * TILE])
@pytest.mark.parametrize("workers", [1, 2])
def test_dot_products_have_the_same_bits_for_any_chunks_and_workers(chunk: int, workers: int) -> None:
    values = torch.randn(3, 4 * TILE + 17, generator=torch.Generator().manual_seed(0))
    tiles = 5
    states = [gram(values[:, :0]).init(values.shape[1], tiles, None, 0) for _ in range(workers)]
    for number, start in enumerate(range(0, values.shape[1], chunk)):
        gram(values[:, start : start + chunk]).reduce(states[number % workers], start // TILE)
    state = states[0]
    for other in states[1:]:
        state = gram(values).combine(state, other)

    streamed = gram(values).finish(state)

    assert torch.equal(gram(values).exact(), streamed)
    torch.testing.assert_close(values.double() @ values.double().T, streamed, rtol=1e-12, atol=1e-9)


def test_what_came_before_the_edges_moved_is_looked_at_again() -> None:
    """A chunk's values, picked with the old edges, when room gets short amid them."""
    generator = np.random.default_rng(0)
    hits = 0
    with mock.patch.object(brackets, "LEAST_NEW", 3):
        for _ in range(500):
            values = generator.integers(0, 60, 100).astype(np.float32)
            bracket = Bracket(-np.inf, float(values[0]), np.inf, 16)
            bracket.add(values)
            rank = int(generator.integers(100))
            with suppress(Miss):
                assert np.sort(values)[rank] == bracket.at(rank)
                hits += 1
    assert hits > 50
