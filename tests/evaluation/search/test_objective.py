"""What is chosen by, and which of two points is better."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergebench.errors import RecipeError, RunError
from mergebench.evaluation import Record
from mergebench.evaluation.search.history import History, Point
from mergebench.evaluation.search.objective import Objective
from mergebench.evaluation.task import Direction


def record(task: str, value: float, metric: str = "accuracy", direction: Direction = "higher") -> Record:
    return Record("m", "merged", task, "validation", metric, direction, value, None, 10, None, 0.0, {})


def test_objectives_by_hand() -> None:
    records = [record("a", 0.25), record("b", 0.75)]
    own = {"a": 0.5, "b": 0.75}
    assert Objective("mean", {}).of(records) == (0.5, "higher")
    assert Objective("relative", own).of(records) == (0.75, "higher")
    assert Objective("worst", own).of(records) == (0.5, "higher")


def test_where_lower_is_better_a_share_is_turned_round() -> None:
    records = [record("a", 20.0, "perplexity", "lower"), record("b", 0.9)]
    own = {"a": 10.0, "b": 0.9}
    assert Objective("relative", own).of(records) == (0.75, "higher")
    assert Objective("worst", own).of(records) == (0.5, "higher")
    assert Objective("mean", {}).of(records[:1]) == (20.0, "lower")
    with pytest.raises(RecipeError, match="different metrics"):
        Objective("mean", {}).of(records)


def test_nothing_is_a_share_of_zero() -> None:
    with pytest.raises(RunError, match="no share"):
        Objective("relative", {"a": 0.0}).of([record("a", 0.5)])


@pytest.mark.parametrize(("direction", "order"), [("higher", [1, 3, 0]), ("lower", [0, 1, 3])])
def test_the_best_is_the_first_of_equal_ones(direction: str, order: list[int], tmp_path: Path) -> None:
    objectives = [0.2, 0.5, None, 0.5]
    points = [Point(i, {}, {}, value, 0.0, None if value else "nan") for i, value in enumerate(objectives)]
    history = History(tmp_path, {}, direction, {}, points)
    assert [point.number for point in history.ranked] == order
    costs = [history.costs(point) for point in points]
    assert sorted(range(4), key=costs.__getitem__) == [*order, 2]
    assert history.best is points[order[0]] and history.to_dict()["best"] == order[0]


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    made = {"objective": "mean", "direction": "higher", "metrics": {}}
    history = History(tmp_path, {"seed": 3, **made})
    history.add(Point(0, {"lambda": 0.3, "normalize": True}, {"a": 0.1}, 0.1, 1.5))
    history.add(Point(1, {"lambda": 0.4, "normalize": None}, {}, None, 0.1, "nan"))
    again = History(tmp_path, {"seed": 3, **made})
    again.resume()
    assert again == history
    with pytest.raises(RecipeError, match="another --seed"):
        History(tmp_path, {"seed": 4, **made}).resume()
