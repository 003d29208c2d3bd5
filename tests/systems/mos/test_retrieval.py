"""Retrieval of all items at once equals the published loop, one item at a time, on any table of transitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergebench.systems.mos.retrieval import Retrieval, retrieve


def loop(row: list[int], first: int) -> tuple[list[int], list[int]]:
    """The adapters evaluated and the tasks they predicted, as Sun et al. (2412.09441) walk: one item, at most 4."""
    visited, predicted, now = [], [], first
    while True:
        visited.append(now)
        predicted.append(row[now])
        if len(visited) >= 4 or row[now] == now:
            return visited, predicted
        now = row[now]


def of_table(table: Tensor, first: Tensor) -> Retrieval:
    """table [n, tasks]: what each item predicts under each adapter. Each may be asked for once."""
    asked: set[tuple[int, int]] = set()

    def ask(adapter: int, items: Tensor) -> Tensor:
        assert len(items) and items.diff().gt(0).all()
        new = {(adapter, item) for item in items.tolist()}
        assert not asked & new
        asked.update(new)
        return table[items, adapter]

    found = retrieve(first, ask)
    paths = {(adapter, item) for item, path in enumerate(found.visited.tolist()) for adapter in path if adapter >= 0}
    assert asked == paths  # none that is on no path
    return found


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    tasks, items = draw(st.integers(1, 6)), draw(st.integers(0, 12))
    row = st.lists(st.integers(0, tasks - 1), min_size=tasks, max_size=tasks)
    table = draw(st.lists(row, min_size=items, max_size=items))
    first = draw(st.lists(st.integers(0, tasks - 1), min_size=items, max_size=items))
    return torch.tensor(table, dtype=torch.int64).reshape(items, tasks), torch.tensor(first, dtype=torch.int64)


@given(tables())
def test_it_walks_as_the_loop_does(drawn: tuple[Tensor, Tensor]) -> None:
    table, first = drawn
    found = of_table(table, first)

    for item, start in enumerate(first.tolist()):
        row = table[item].tolist()
        visited, predicted = loop(row, start)
        assert found.visited[item].tolist() == visited + [-1] * (4 - len(visited))
        assert found.predicted[item].tolist() == predicted + [-1] * (4 - len(predicted))
        assert found.evaluations[item] == len(visited) <= 4
        assert found.adapter[item] == visited[-1]
        assert found.agreement[item] == (row[visited[-1]] == visited[-1])
        assert found.cycle[item] == (row[visited[-1]] in visited[:-1])
        assert [int(found.held(step)[item]) for step in range(4)] == (visited + [visited[-1]] * 4)[:4]


@pytest.mark.parametrize(
    ("row", "first", "path", "cycle", "agreement"),
    [
        ([1, 0, 2], 0, [0, 1, 0, 1], True, False),  # the fourth evaluation is adapter 1
        ([1, 2, 2], 0, [0, 1, 2], False, True),
        ([0, 0, 0], 0, [0], False, True),
        ([0], 0, [0], False, True),
        ([1, 2, 0], 0, [0, 1, 2, 0], True, False),
        ([1, 2, 3, 0], 0, [0, 1, 2, 3], True, False),  # the fifth would be the first again
        ([1, 2, 3, 4, 4], 0, [0, 1, 2, 3], False, False),  # stopped on the way
        ([1, 2, 3, 3], 0, [0, 1, 2, 3], False, True),  # there at the last moment
    ],
)
def test_paths_worked_out_by_hand(row: list[int], first: int, path: list[int], cycle: bool, agreement: bool) -> None:
    found = of_table(torch.tensor([row]), torch.tensor([first]))

    assert [adapter for adapter in found.visited[0].tolist() if adapter >= 0] == path
    assert found.adapter.tolist() == path[-1:] and found.evaluations.tolist() == [len(path)]
    assert found.cycle.tolist() == [cycle] and found.agreement.tolist() == [agreement]


def test_items_at_one_adapter_are_one_question() -> None:
    table, questions = torch.tensor([[1, 1, 2], [1, 1, 2], [0, 1, 2], [2, 1, 2]]), []

    def ask(adapter: int, items: Tensor) -> Tensor:
        questions.append((adapter, items.tolist()))
        return table[items, adapter]

    retrieve(torch.tensor([0, 0, 0, 1]), ask)
    assert questions == [(0, [0, 1, 2]), (1, [3]), (1, [0, 1])]


def test_the_limit() -> None:
    found = retrieve(torch.tensor([0]), lambda adapter, items: items * 0 + adapter + 1, limit=7)

    assert found.visited.tolist() == [[0, 1, 2, 3, 4, 5, 6]] and found.adapter.tolist() == [6]


def test_the_summary() -> None:
    table = torch.tensor([[0, 0, 0], [1, 2, 2], [1, 0, 2], [1, 0, 2]])  # settled, two steps on, round and round twice
    found = of_table(table, torch.tensor([0, 0, 0, 1]))

    assert found.summary(torch.tensor([0, 2, 1, 1])) == {
        "steps": [2 / 4, 2 / 4, 3 / 4, 3 / 4],  # they hold 0 0 0 1, then 0 1 1 0, 0 2 0 1, 0 2 1 0
        "evaluations": (1 + 3 + 4 + 4) / 4,
        "cycles": 2 / 4,
        "agreement": 2 / 4,
    }
    assert found.summary(None)["steps"] is None
