"""`--set`: what it changes, and that its mistakes are told as its own, not as the file's."""

# ruff: noqa: E501  (a table reads best with a case a line)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mergebench.errors import RecipeError
from mergebench.recipe import load

Write = Callable[[str], str]

TEXT = """
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 0.5}
  - model: b
"""


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["parameters.density=0.2"], {"parameters": {"density": 0.2}}),
        (["parameters.density=1e-3"], {"parameters": {"density": 0.001}}),
        (["parameters.density=0.2", "parameters.density=0.3"], {"parameters": {"density": 0.3}}),
        (["parameters.density=0.2", "parameters.lambda=2"], {"parameters": {"density": 0.2, "lambda": 2}}),
        (["parameters={density: 0.2}"], {"parameters": {"density": 0.2}}),
        (["models.0.parameters.weight=2"], {"models": [{"model": "a", "parameters": {"weight": 2}}, {"model": "b"}]}),
        (
            ["models.1.parameters.weight=2"],
            {
                "models": [
                    {"model": "a", "parameters": {"weight": 0.5}},
                    {"model": "b", "parameters": {"weight": 2}},
                ]
            },
        ),
        (["models.1.model=c=d"], {"models": [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "c=d"}]}),
        (["models=[{model: c}]"], {"models": [{"model": "c"}]}),
        (["merge_method=linear"], {"merge_method": "linear"}),
        (["scope=model", "seed=7", " dtype =float16"], {"scope": "model", "seed": 7, "dtype": "float16"}),
        (["exclude=['*.bias']"], {"exclude": ["*.bias"]}),
        (["scope=", "seed=null"], {}),
        (["evaluate.suite=s.yaml", "evaluate.baselines=[linear]"], {"evaluate": {"suite": "s.yaml", "baselines": ["linear"]}}),
    ],
)  # fmt: skip
def test_what_it_changes(write: Write, overrides: list[str], changed: dict[str, Any]) -> None:
    plain = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b"}],
    }
    assert load(write(TEXT), overrides) == load({**plain, **changed})
    assert load(plain, overrides) == load({**plain, **changed})


def test_the_callers_mapping_stays_as_it_is() -> None:
    weight = {"weight": 0.5}
    data = {"merge_method": "linear", "models": [{"model": "a", "parameters": weight}]}
    recipe = load(data, ["models.0.parameters.weight=2", "parameters.normalize=false"])
    assert recipe.models[0].parameters == {"weight": 2}
    assert data == {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 0.5}}]}
    weight["weight"] = 3
    assert recipe.models[0].parameters == {"weight": 2}


def test_aliased_values_change_one_by_one(write: Write) -> None:
    text = "merge_method: linear\nmodels:\n- {model: a, parameters: &p {weight: 1}}\n- {model: b, parameters: *p}\n"
    recipe = load(write(text), ["models.0.parameters.weight=2"])
    assert [entry.parameters["weight"] for entry in recipe.models] == [2, 1]


PATH_HINT = "write a path and a value, such as --set parameters.density=0.2 or --set models.0.parameters.weight=0.5"


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("density", "--set density: not of the form PATH=VALUE", PATH_HINT),
        ("=1", "--set =1: not of the form PATH=VALUE", PATH_HINT),
        ("parameters.=1", "--set parameters.=1: not of the form PATH=VALUE", PATH_HINT),
        ("", "--set : not of the form PATH=VALUE", PATH_HINT),
        ("scope=[1", "--set scope=[1: not valid YAML: expected ',' or ']', but got '<stream end>'", None),
        ("scope={a: 1, a: 2}", "--set scope={a: 1, a: 2}: a: given twice", "it is in line 1 already"),
        ("scope=2026-01-01", "--set scope=2026-01-01: no place for a YAML timestamp here", "quote it if it is text"),
        ("seed=.inf", "--set seed=.inf: must be finite, got inf", None),
        ("models.2.model=c", "--set models.2.model=c: models has no entry '2'", "it has 2 entries, counted from 0"),
        ("models.-1.model=c", "--set models.-1.model=c: models has no entry '-1'", "it has 2 entries, counted from 0"),
        ("models.a=c", "--set models.a=c: models has no entry 'a'", "it has 2 entries, counted from 0"),
        ("merge_method.x=c", "--set merge_method.x=c: merge_method is 'ties', nothing stands below it", PATH_HINT),
        ("parameters.densty=1", "--set parameters.densty=1: 'ties' has no such parameter", "did you mean 'density' (share of elements kept, above 0, at most 1)?"),
        ("parameters.density=5", "--set parameters.density=5: must be above 0, at most 1, got 5", "share of elements kept"),
        ("parameters={densty: 1}", "--set parameters={densty: 1}: parameters.densty: 'ties' has no such parameter", "did you mean 'density' (share of elements kept, above 0, at most 1)?"),
        ("modles=[]", "--set modles=[]: no such key", "did you mean 'models'?"),
        ("models=[{modle: a}]", "--set models=[{modle: a}]: models.0.modle: no such key", "did you mean 'model'?"),
        ("models.0.parameters.weight=x", "--set models.0.parameters.weight=x: must be a number, got 'x'", "weight of the model"),
        ("models.1.parameters.x.y=1", "--set models.1.parameters.x.y=1: 'ties' has no such parameter", "it takes density, lambda, normalize, weight"),
        ("merge_method=tise", "--set merge_method=tise: no method is called 'tise'", "did you mean 'ties'?"),
        ("modules={}", "--set modules={}: must be a mapping of modules, got nothing", "write it as modules: {NAME: {models: [...]}}"),
        ("seed\n", "--set 'seed\\n': not of the form PATH=VALUE", PATH_HINT),
    ],
)  # fmt: skip
def test_mistakes(write: Write, override: str, message: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write(TEXT), [override])
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_the_file_is_still_cited_for_its_own_mistakes(write: Write) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write(TEXT), ["merge_method=slerp", "parameters.t=0.5", "models.1.parameters.t=0.5"])
    assert caught.value.message == "--set models.1.parameters.t=0.5: 'slerp' takes it once for all models"
    with pytest.raises(RecipeError) as caught:
        load(write(TEXT + "seed: x\n"), ["parameters.density=0.5"])
    assert caught.value.message == "recipe.yaml:7:1: seed: must be a whole number, at least 0, got 'x'"


def test_where_after_an_override(write: Write) -> None:
    recipe = load(write(TEXT), ["models.1.model=c", "parameters.density=0.5", "models.0={model: d}"])
    assert recipe.where("models", 1, "model") == "--set models.1.model=c"
    assert recipe.where("parameters", "density") == "--set parameters.density=0.5"
    assert recipe.where("models", 0, "parameters", "weight") == "--set models.0={model: d}"
    assert recipe.where("models", 1) == "recipe.yaml:6:5"


def test_seed(write: Write) -> None:
    path = write(TEXT + "seed: 3\n")
    assert load(path).seed == 3
    assert load(path, seed=0).seed == 0
    assert load(path, ["seed=4"], seed=5).seed == 5
    assert load(path, seed=5).where("seed") == "--seed 5"
    with pytest.raises(RecipeError) as caught:
        load(path, seed=-1)
    assert caught.value.message == "--seed -1: must be a whole number, at least 0, got -1"
