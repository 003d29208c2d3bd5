"""A single module is the recipe itself; its parameters stand between a slice's and the top's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mergebench.errors import RecipeError
from mergebench.recipe import load
from mergebench.recipe.gradients import value_at

Write = Callable[[str], str]
MODELS = [{"model": "a"}, {"model": "b"}]


def recipe(module: dict[str, Any], **more: Any) -> Any:
    return load({"merge_method": "linear", "modules": {"default": module}, **more})


def test_it_equals_its_contents() -> None:
    flat = load({"merge_method": "linear", "models": MODELS, "parameters": {"weight": 0.3}})
    assert recipe({"models": MODELS, "parameters": {"weight": 0.3}, "slices": None}) == flat
    assert recipe({"models": MODELS}, parameters={"weight": 0.3}) == flat
    assert recipe({"models": MODELS, "parameters": {"weight": 0.3}}, parameters={"weight": 9}, models=None) == flat


def test_precedence() -> None:
    sources = [
        {"model": "a", "layer_range": [0, 2], "parameters": {"weight": 4}},
        {"model": "b", "layer_range": [0, 2]},
    ]
    levels = {"weight": 2, "normalize": False}
    found = recipe({"slices": [{"sources": sources}], "parameters": levels}, parameters={"weight": 1})
    assert found.slice_params(0, {0: "x", 1: "x"}, "x", 0.0) == {"weight": (4.0, 2.0), "normalize": False}
    shared = [{"sources": sources, "parameters": {"weight": 3}}]
    found = recipe({"slices": shared, "parameters": levels}, parameters={"weight": 1})
    assert found.slice_params(0, {0: "x", 1: "x"}, "x", 0.0)["weight"] == (4.0, 3.0)


@pytest.mark.parametrize(
    ("module", "top", "mlp", "other"),
    [
        ([{"filter": "mlp", "value": 2}], 1, 2, 1),
        ({"filter": "mlp", "value": 2}, 1, 2, 1),
        ([{"filter": "mlp", "value": 2}], {"value": 3}, 2, 3),
        ([{"filter": "mlp", "value": 2}], [{"filter": "mlp", "value": 9}, {"value": 3}], 2, 3),
        ([{"filter": "mlp", "value": 2}], [0, 1], 2, 0.5),
        ([5, 7], [{"filter": "mlp", "value": 2}], 6, 6),
        (4, [{"filter": "mlp", "value": 2}], 4, 4),
    ],
)
def test_a_filter_that_fits_nothing_leaves_it_to_the_top(module: Any, top: Any, mlp: float, other: float) -> None:
    weight = recipe({"models": MODELS, "parameters": {"weight": module}}, parameters={"weight": top}).parameters[
        "weight"
    ]
    assert (value_at(weight, "x.mlp", 0.5), value_at(weight, "x.norm", 0.5)) == (mlp, other)


def test_positions(write: Write) -> None:
    text = """
    merge_method: linear
    parameters: {normalize: true}
    modules:
      text_decoder:
        models:
          - model: a
          - model: b
            parameters: {wieght: 1}
        parameters:
          weight: 1
    """
    found = load(write(text.replace("wieght", "weight")))
    assert found.where("models", 1, "model") == "recipe.yaml:7:9"
    assert (found.where("parameters", "weight"), found.where("parameters")) == ("recipe.yaml:10:7", "recipe.yaml:2:1")
    with pytest.raises(RecipeError, match=r"^recipe.yaml:8:22: models.1.parameters.wieght: 'linear' has no such"):
        load(write(text))
    changed = load(write(text.replace("wieght", "weight")), ["modules.text_decoder.models.0.model=c"])
    assert (changed.models[0].model, changed.where("models", 0, "model").split()[0]) == ("c", "--set")
    replaced = load(write(text), ["modules={any: {models: [{model: d}]}}"])
    assert (replaced.models[0].model, replaced.where("models", 0).split()[0]) == ("d", "--set")
