"""The words that methods are written in, against Python.

python -m pytest tests/engine/test_chunks.py
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.engine.chunks import by_rank, plus_or_minus, trim

ROWS = st.integers(1, 9).flatmap(
    lambda columns: st.lists(st.lists(st.integers(-3, 3).map(float), min_size=columns, max_size=columns), min_size=1)
)


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_by_rank(rows: list[list[float]]) -> None:
    """Each row by itself; equal magnitudes in the order they stand in."""
    columns = len(rows[0])
    before = torch.tensor(rows)
    values = before.clone()

    found = by_rank(values, torch.arange(columns) + 0.5)

    for row, ranked in zip(rows, found.tolist(), strict=True):
        order = sorted(range(columns), key=lambda place, row=row: (abs(row[place]), place))
        assert [place for _, place in sorted(zip(ranked, range(columns), strict=True))] == order
        assert sorted(ranked) == [rank + 0.5 for rank in range(columns)]
    assert torch.equal(values, before)


def test_by_rank_tells_neighbouring_floats_apart() -> None:
    one = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()

    assert by_rank(torch.tensor([[-one, 1.0, 1e-45, 0.0]]), torch.arange(4.0)).tolist() == [[3.0, 2.0, 1.0, 0.0]]


def test_trim_keeps_what_equals_a_threshold() -> None:
    values = torch.tensor([[0.0, -1, 2, -3, 4], [0.0, -1, 2, -3, 4]])

    kept = trim(values, torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0], [2.0]]))

    assert kept.tolist() == [[0, -1, 2, -3, 0], [0, -1, 2, 0, 0]]
    assert trim(values, torch.tensor([[2.0], [torch.inf]])).tolist() == [[0, 0, 2, -3, 4], [0] * 5]


def test_an_even_vote_is_plus() -> None:
    assert plus_or_minus(torch.tensor([-0.0, 0.0, -1e-45, 1e-45, -2.0])).tolist() == [1, 1, -1, 1, -1]
