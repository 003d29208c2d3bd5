"""What --over says, the ranges that follow from a parameter, and the points of each strategy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

import mergebench
from mergebench.errors import RecipeError
from mergebench.evaluation.search.space import Dimension, as_given, at_point, parse
from mergebench.evaluation.search.strategies import STRATEGIES, choose
from mergebench.recipe import Recipe


def recipe(method: str = "ties", models: Sequence[Any] = ("runs/one", "runs/two"), **parameters: Any) -> Recipe:
    entries = [one if isinstance(one, dict) else {"model": one} for one in models]
    return mergebench.load({"merge_method": method, "base_model": "base", "models": entries, "parameters": parameters})


def plain(over: str, one: Recipe | None = None) -> list[dict[str, Any]]:
    return [dimension.to_plain() for dimension in parse([over], one or recipe())]


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ("lambda", [{"name": "lambda", "low": 0.2, "high": 1.5}]),  # no bounds: around the recipe's 1
        ("lambda=0.2:1.2", [{"name": "lambda", "low": 0.2, "high": 1.2}]),
        ("lambda=-1:1", [{"name": "lambda", "low": -1.0, "high": 1.0}]),
        ("parameters.lambda=1:2", [{"name": "lambda", "low": 1.0, "high": 2.0}]),
        ("density", [{"name": "density", "low": 0.01, "high": 1}]),  # above 0, at most 1
        ("density=0.05/0.1/0.2", [{"name": "density", "values": [0.05, 0.1, 0.2]}]),
        ("normalize", [{"name": "normalize", "values": [False, True]}]),
        ("normalize=true/false", [{"name": "normalize", "values": [True, False]}]),
        ("weight.*=0:1", [{"name": f"weight.{name}", "low": 0.0, "high": 1.0} for name in ("one", "two")]),
        ("weight.two", [{"name": "weight.two", "low": 0.2, "high": 1.5}]),
        ("models.1.parameters.weight", [{"name": "weight.two", "low": 0.2, "high": 1.5}]),
        (
            "density.one=0.1/0.2 , lambda=1:2",
            [{"name": "density.one", "values": [0.1, 0.2]}, {"name": "lambda", "low": 1.0, "high": 2.0}],
        ),
    ],
)
def test_forms(over: str, expected: list[dict[str, Any]]) -> None:
    assert plain(over) == expected


@pytest.mark.parametrize(
    ("one", "over", "low", "high"),
    [
        (recipe(**{"lambda": 0.5}), "lambda", 0.1, 0.75),
        (recipe(**{"lambda": -2.0}), "lambda", -3.0, -0.4),
        (recipe("slerp", ["ft"], t=0.3), "t", 0, 1),
        (recipe("pcb"), "clip", 0, 0.49),
        (recipe("wudi"), "steps", 60, 450),
        (recipe("consensus_ta"), "k", 0, 3),
        (recipe("breadcrumbs"), "gamma", 0, 1),
        (recipe("wudi"), "lr", 2e-6, 1.5e-5),
    ],
)
def test_ranges_from_what_a_parameter_declares(one: Recipe, over: str, low: float, high: float) -> None:
    (dimension,) = parse([over], one)
    assert (dimension.low, dimension.high) == (pytest.approx(low), pytest.approx(high))


def test_a_base_among_the_models_has_no_weight_of_its_own() -> None:
    listed = recipe("ties", ["base", "runs/one", "runs/two"])
    assert [one.name for one in parse(["weight.*"], listed)] == ["weight.one", "weight.two"]
    found = at_point(listed, parse(["weight.*"], listed), {"weight.one": 0.5, "weight.two": 2.0})
    assert [entry.parameters for entry in found.models] == [{}, {"weight": 0.5}, {"weight": 2.0}]
    counted = recipe("linear", ["base", "runs/one"])
    assert [one.name for one in parse(["weight.*"], counted)] == ["weight.base", "weight.one"]


def test_the_point_of_a_recipe_is_the_recipe() -> None:
    one = recipe("pcb", ["runs/one", {"model": "runs/two", "parameters": {"weight": 0.4}}], density=0.2)
    space = parse(["lambda", "weight.*", "density", "clip"], one)
    given = as_given(space)
    assert given == {"lambda": 1.0, "weight.one": 1.0, "weight.two": 0.4, "density": 0.2, "clip": None}
    assert at_point(one, space, given).params(at_point(one, space, given).models) == one.params(one.models)
    assert at_point(one, space, {**given, "lambda": 0.3}).parameters["lambda"] == 0.3


@pytest.mark.parametrize("over", ["lambda=0.2:1.7", "density", "density=0.1/0.2/0.7", "normalize", "weight.one=-3:5"])
def test_places_and_values_lead_to_each_other(over: str) -> None:
    (one,) = parse([over], recipe())
    values = [one.at(place / 20) for place in range(21)]
    assert [one.at(one.place(value)) for value in values] == values
    assert values[0] == (one.choices[0] if one.choices else one.low)
    assert values[-1] == (one.choices[-1] if one.choices else one.high)


def test_what_must_be_above_zero_is_spread_by_factors() -> None:
    (one,) = parse(["density=0.01:1"], recipe())
    assert [one.at(place) for place in (0, 0.25, 0.5, 0.75, 1)] == [0.01, 0.03162, 0.1, 0.3162, 1]


def test_whole_numbers_stay_whole() -> None:
    (one,) = parse(["k=1:4"], recipe("consensus_ta"))
    assert [one.at(i / 9) for i in range(10)] == [1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    assert one.levels == 4 and all(type(one.at(i / 9)) is int for i in range(10))


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ("k=1.5:3", "must be a whole number, at least 0, got 1.5"),
        ("combine=ties/tes", "must be one of ties, task_arithmetic, got 'tes'"),
        ("combine=a:b", "must be one of ties, task_arithmetic, got 'a:b'"),
        ("lambda=1:2:3", "a range is LOW:HIGH"),
        ("lambda=1/1", "several different values"),
        ("lambda=nan:1", "must be finite"),
        ("weight.5.parameters", "has no parameter 'weight'"),
    ],
)
def test_what_is_refused(over: str, said: str) -> None:
    method = "consensus_ta" if over.startswith("k") else "knots"
    with pytest.raises(RecipeError, match="--over") as error:
        parse([over], recipe(method))
    assert said in error.value.message


def test_a_value_of_zero_has_no_range_around_it() -> None:
    with pytest.raises(RecipeError, match=r"no range follows from 0\.0") as error:
        parse(["lambda"], recipe(**{"lambda": 0.0}))
    assert error.value.hint == "give it a range or values: lambda=LOW:HIGH or lambda=A/B/C"


# -- strategies ------------------------------------------------------------------------------------


def points(name: str, over: str, budget: int, cost: Callable[..., float] = lambda *_: 0.0, seed: int = 0) -> list[Any]:
    """The values asked for, as many as the budget has."""
    space = parse([over], recipe())
    start = [one.place(one.own) for one in space]
    steps = STRATEGIES[name](space, start, budget, seed)
    found: list[tuple[Any, ...]] = []
    costs = None
    while len(found) < budget:
        try:
            generation = next(steps) if costs is None else steps.send(costs)
        except StopIteration:
            break
        assert all(0 <= place <= 1 for places in generation for place in places)
        new = [tuple(one.at(place) for one, place in zip(space, places, strict=True)) for places in generation]
        costs = [(cost(*values),) for values in new]
        found += new
    return found[:budget]


def test_a_grid_of_one_dimension() -> None:
    assert points("grid", "lambda=0:1", 5) == [(0.0,), (0.25,), (0.5,), (0.75,), (1.0,)]
    assert points("grid", "density=0.1/0.2/0.7", 10) == [(0.1,), (0.2,), (0.7,)]


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8, 20, 39, 100])
@pytest.mark.parametrize("over", ["lambda=0:1,weight=0:1", "lambda=0:1,normalize,density=0.1/0.2/0.3,weight.*=0:1"])
def test_a_grid_takes_as_many_values_as_fit(over: str, budget: int) -> None:
    found = points("grid", over, budget)
    columns = [sorted(set(column)) for column in zip(*found, strict=True)]
    assert sorted(found) == sorted(itertools.product(*columns)) and len(set(found)) == len(found)
    most = [one.levels or math.inf for one in parse([over], recipe())]
    sizes = [len(column) for column in columns]
    for i, size in enumerate(sizes):  # one more of any dimension is too many
        assert size == most[i] or math.prod([*sizes[:i], size + 1, *sizes[i + 1 :]]) > budget


@pytest.mark.parametrize(("budget", "sizes"), [(4, (2, 2)), (8, (4, 2)), (20, (5, 4)), (39, (6, 6)), (100, (10, 10))])
def test_a_grid_is_even(budget: int, sizes: tuple[int, int]) -> None:
    columns = zip(*points("grid", "lambda=0:1,weight=0:1", budget), strict=True)
    assert tuple(len(set(column)) for column in columns) == sizes


def test_lambda_runs_fastest_through_a_grid() -> None:
    found = points("grid", "lambda=0:1,density=0.1/0.2", 6)
    assert found == [(0.0, 0.1), (0.5, 0.1), (1.0, 0.1), (0.0, 0.2), (0.5, 0.2), (1.0, 0.2)]


@pytest.mark.parametrize("name", ["random", "cmaes"])
def test_a_seed_says_everything(name: str) -> None:
    over = "lambda=0:1,weight.*=0:2"
    first, again, other = (points(name, over, 25, lambda x, *_: x, seed) for seed in (3, 3, 4))
    assert first == again != other


def test_random_points_are_uniform() -> None:
    found = [value for (value,) in points("random", "lambda=0:1", 2000)]
    for part in range(10):
        assert 140 < sum(part / 10 <= value < (part + 1) / 10 for value in found) < 260  # 4.5 standard deviations


def test_evolution_finds_the_lowest_place() -> None:
    def cost(*values: float) -> float:
        return sum((value - goal) ** 2 for value, goal in zip(values, (0.4, 1.3, 0.9), strict=True))

    found = min(points("cmaes", "lambda=0:2,weight.*=0:2", 200, cost), key=lambda one: cost(*one))
    blind = min(points("random", "lambda=0:2,weight.*=0:2", 200, cost), key=lambda one: cost(*one))
    assert cost(*found) < 1e-3 < cost(*blind)


def test_evolution_goes_on_where_points_fail() -> None:
    found = points("cmaes", "lambda=0:2,weight.*=0:2", 100, lambda x, *_: 1e300 if x > 0.5 else x)
    assert len(found) == 100 and min(found)[0] < 0.1


def test_the_strategy_follows_from_the_dimensions() -> None:
    space = list(parse(["lambda", "weight.*"], recipe()))
    assert [choose(None, space[:count]) for count in (1, 2, 3)] == ["grid", "grid", "cmaes"]
    assert choose("random", space) == "random"


def test_places_outside_lie_at_the_edge() -> None:
    (one,) = parse(["lambda=0.5:2"], recipe())
    assert [one.place(value) for value in (0.1, None, 3.0)] == [0, 0.5, 1]
    assert replace(one, choices=(1, 2)).place(7) == 0.5 and isinstance(one, Dimension)
