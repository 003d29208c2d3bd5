"""The weights of checkpoints: against the recursions and the decay that they stand for, and against Megatron-LM's."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mergebench.errors import RecipeError
from mergebench.recipe import schedules

EVERY: list[Any] = [
    "mean",
    "ema",
    {"ema": {"decay": 0.0}},
    {"ema": {"decay": 0.95}},
    "wsm",
    {"wsm": {"decay": "linear"}},
    {"wsm": {"decay": "minus-sqrt"}},
    "minus-sqrt",
]


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("written", EVERY)
def test_weights_are_shares(written: Any, n: int) -> None:
    weights = schedules.read(written).weights(n)

    assert len(weights) == n and min(weights) >= 0
    assert math.isclose(sum(weights), 1)


def test_ema_is_its_recursion() -> None:
    checkpoints = [3.0, -1.0, 4.0, 1.5, 9.0]
    average = checkpoints[0]
    for one in checkpoints[1:]:
        average = 0.3 * one + 0.7 * average

    weights = schedules.read({"ema": {"decay": 0.7}}).weights(5)

    assert math.isclose(sum(w * x for w, x in zip(weights, checkpoints, strict=True)), average)


def test_wsm_is_the_run_whose_updates_are_scaled() -> None:
    factors = [1.0, 0.7, 0.7, 0.1]
    updates = [0.5, -2.0, 3.0, 0.25]
    checkpoints = [1.0]
    decayed = 1.0
    for factor, update in zip(factors, updates, strict=True):
        checkpoints.append(checkpoints[-1] + update)
        decayed += factor * update

    weights = schedules.read({"wsm": {"decay": factors}}).weights(5)

    assert math.isclose(sum(w * x for w, x in zip(weights, checkpoints, strict=True)), decayed)


def test_minus_sqrt_has_megatrons_weights() -> None:
    """Of four checkpoints: its decay at 0, 1/4, 1/2, 3/4 is 1, 1/2, 1 - sqrt(1/2), 1 - sqrt(3/4)."""
    half, quarter = math.sqrt(0.5), math.sqrt(0.75)

    assert schedules.minus_sqrt(4) == pytest.approx([0.5, half - 0.5, quarter - half, 1 - quarter])


def test_the_linear_decay_is_the_mean() -> None:
    assert schedules.wsm(7, "linear") == pytest.approx(schedules.mean(7))


def test_cosine_of_three() -> None:
    """Factors 3/4 and 1/4 on the two updates."""
    assert schedules.read("wsm").weights(3) == pytest.approx([0.25, 0.5, 0.25])


def test_weights_of_ones_own_are_divided_by_their_sum() -> None:
    assert schedules.read({"weights": [1, 3, -2, 2]}).weights(4) == [0.25, 0.75, -0.5, 0.5]


@pytest.mark.parametrize("written", [*EVERY, {"wsm": {"decay": [1, 0.5]}}, {"weights": [1.0, 2.0, 3.0]}])
def test_it_is_written_as_it_is_read(written: Any) -> None:
    one = schedules.read(written)

    assert schedules.read(one.to_plain()) == one


@pytest.mark.parametrize(
    ("written", "what"),
    [
        ("maen", "'maen' is no schedule"),
        (3, "must be a schedule, got 3"),
        ({"mean": {"decay": 0.5}}, "'mean' has no decay"),
        ({"ema": {"alpha": 0.5}}, "ema: no such schedule, or no such parameter"),
        ({"ema": {"decay": 1}}, "must be at least 0, below 1, got 1"),
        ({"ema": 0.5}, "ema: no such schedule, or no such parameter"),
        ({"wsm": {"decay": "square"}}, "must be cosine, linear, minus-sqrt or a list"),
        ({"wsm": {"decay": [0.5, 0.6]}}, "the factors of a decay fall"),
        ({"wsm": {"decay": [1.5]}}, "the factors of a decay fall"),
        ({"weights": []}, "must be a list of numbers"),
        ({"weights": [1, True]}, "must be a list of numbers"),
        ({"weights": [1, -1]}, "add up to zero"),
    ],
)
def test_what_is_no_schedule(written: Any, what: str) -> None:
    with pytest.raises(RecipeError, match=what.replace("(", r"\(")):
        schedules.read(written)


@pytest.mark.parametrize(
    ("written", "what"),
    [
        ({"weights": [1, 2]}, "2 weights for 3 checkpoints"),
        ({"wsm": {"decay": [1]}}, "1 factors, one for each interval between two, for 3 checkpoints"),
    ],
)
def test_a_schedule_for_another_number_of_checkpoints(written: Any, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        schedules.read(written).weights(3)
