"""What a good recipe becomes: defaults, parameters for each model, baselines."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from mergebench import methods
from mergebench.errors import RecipeError
from mergebench.recipe import Baseline, Entry, Evaluation, Recipe, load
from mergebench.recipe.tokens import Vocabulary

Write = Callable[[str], str]


def test_defaults() -> None:
    recipe = load({"merge_method": "pcb", "base_model": "base", "models": [{"model": "a"}]})
    assert recipe.models == (Entry(model="a", task_vector=None, parameters={}),)
    assert recipe.scope == "model"  # the method's own
    assert recipe.parameters == {"density": 0.1, "lambda": 1.0, "weight": 1.0, "variant": "readme"}
    assert (recipe.seed, recipe.dtype, recipe.out_dtype, recipe.include, recipe.exclude) == (0, None, None, (), ())
    assert (recipe.evaluate, recipe.path, recipe.folders, recipe.notes) == (None, None, (), ())
    assert recipe.method is methods.get("pcb")
    assert recipe.method.make_params(recipe.params(recipe.models)).clip is None


def test_everything(write: Write) -> None:
    path = write(
        """
        merge_method: ties
        base_model: org/base@main
        models:
          - model: org/base@main
          - model: ./a+./adapter
            parameters: {weight: 0.5}
          - task_vector: ./tv
            parameters:
        parameters:
          density: 1e-1
          weight: 2
          normalize: false
        scope: model
        include: ["model.*"]
        exclude: ["*.bias", lm_head.weight]
        seed: 7
        dtype: torch.bfloat16
        out_dtype: float16
        tokenizer_source: base
        chat_template:
        evaluate:
          suite: suite.yaml
          baselines: [linear, {ties: {density: 0.2}}]
        """
    )
    recipe = load(path)
    assert recipe == Recipe(
        merge_method="ties",
        base_model="org/base@main",
        models=(
            Entry(model="org/base@main"),
            Entry(model="./a+./adapter", parameters={"weight": 0.5}),
            Entry(task_vector="./tv"),
        ),
        parameters={"density": 0.1, "weight": 2.0, "lambda": 1.0, "normalize": False},
        scope="model",
        include=("model.*",),
        exclude=("*.bias", "lm_head.weight"),
        seed=7,
        dtype="bfloat16",
        out_dtype="float16",
        vocabulary=Vocabulary("base"),
        evaluate=Evaluation("suite.yaml", (Baseline("linear"), Baseline("ties", {"density": 0.2}))),
    )
    assert recipe.path == Path("recipe.yaml")
    assert recipe.folders == (Path(),)
    assert recipe.where("models", 1, "model") == "recipe.yaml:5:5"
    assert recipe.where("models", 2) == "recipe.yaml:7:5"
    assert recipe.where("nothing") == "recipe.yaml:1:1"
    assert recipe.params(recipe.models[1:]) == {
        "density": (0.1, 0.1),
        "weight": (0.5, 2.0),
        "lambda": 1.0,
        "normalize": False,
    }
    assert all(type(weight) is float for weight in recipe.params(recipe.models)["weight"])
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_frozen() -> None:
    recipe = load({"merge_method": "linear", "models": [{"model": "a"}], "evaluate": {"suite": "s"}})
    for frozen, name in [(recipe, "seed"), (recipe.models[0], "model"), (recipe.evaluate, "suite")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 1)


def test_paths_and_equality(write: Write) -> None:
    write("merge_method: linear\nmodels: [{model: a}]\n")
    Path("sub").mkdir()
    Path("recipe.yaml").rename("sub/r.yaml")
    for path in ("sub/r.yaml", Path("sub/r.yaml")):
        assert load(path).folders == (Path("sub"),)
        assert load(path).where("models", 0) == "sub/r.yaml:2:10"
        assert load(path) == load({"merge_method": "linear", "models": [{"model": Path("a")}]})
    assert load(path) != load(path, ["seed=1"])
    assert load(path).where() == "sub/r.yaml:1:1"
    assert load({"merge_method": "linear", "models": [{"model": "a"}]}).where("models", 0) == "recipe"


def test_values_of_the_model_go_before_the_recipes_own() -> None:
    data = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"density": 0.5}}, {"model": "b"}],
        "parameters": {"density": 0.25},
    }
    recipe = load(data)
    assert recipe.params(recipe.models)["density"] == (0.5, 0.25)
    assert recipe.params(recipe.models)["weight"] == (1.0, 1.0)
    assert recipe.params(recipe.models[::-1])["density"] == (0.25, 0.5)
    assert recipe.params([Entry(model="base"), *recipe.models])["density"] == (0.25, 0.5, 0.25)
    assert recipe.params([])["density"] == ()
    assert recipe.method.make_params(recipe.params(recipe.models)).density == (0.5, 0.25)


def test_a_base_listed_again_may_lack_what_the_others_need(write: Write) -> None:
    recipe = load(
        write(
            """
            merge_method: picky
            base_model: base
            models:
              - model: base
              - {model: a, parameters: {share: 0.5}}
            parameters: {rounds: 2.0}
            """
        )
    )
    assert recipe.params(recipe.models[1:]) == {"share": (0.5,), "rounds": 2}
    assert type(recipe.params(recipe.models[1:])["rounds"]) is int
    with pytest.raises(RecipeError) as caught:
        recipe.params(recipe.models)
    assert caught.value.message == "recipe.yaml:4:5: models.0.parameters.share: missing, 'picky' needs it"
    with pytest.raises(RecipeError) as caught:
        recipe.params([Entry(model="other")])
    assert caught.value.message == "recipe.yaml:3:1: models.2.parameters.share: missing, 'picky' needs it"


def test_habits_are_noted_once(write: Write) -> None:
    recipe = load(
        write(
            """
            merge_method: pcb
            base_model: base
            models:
              - {model: a, parameters: {weight: 0.3, rescale: true}}
              - {model: b, parameters: {rescale: [0, 1]}}
            parameters: {int8_mask: true, normalize: yes}
            """
        )
    )
    assert recipe.notes == ("recipe.yaml:6:14: int8_mask, normalize, rescale: ignored, 'pcb' does not take them",)
    assert recipe.models[0].parameters == {"weight": 0.3}
    assert "int8_mask" not in recipe.parameters
    slerp = {"merge_method": "slerp", "models": [{"model": "a", "parameters": {"weight": 1}}], "parameters": {"t": 1}}
    assert load(slerp).notes == ("recipe: weight: ignored, 'slerp' does not take it",)
    ties = {"merge_method": "ties", "base_model": "x", "models": [{"model": "a"}], "parameters": {"normalize": True}}
    assert load(ties).notes == ()
    assert load({**slerp, "models": [{"model": "a"}]}) == load(slerp)  # a note changes nothing


def test_int8_mask_at_the_top_is_a_habit_too(write: Callable[[str], str]) -> None:
    recipe = load(write("merge_method: linear\nmodels: [{model: a}]\nint8_mask: true\n"))
    assert recipe.notes == ("recipe.yaml:3:1: int8_mask: ignored, 'linear' does not take it",)


def test_mergekit_marks_a_model_of_tokens() -> None:
    data = {"merge_method": "linear", "models": [{"model": "a"}]}
    assert load({**data, "tokenizer_source": "model:org/b"}) == load({**data, "tokenizer_source": "org/b"})


def test_nothing_is_no_wish() -> None:
    data = {"merge_method": "linear", "base_model": "x", "models": [{"model": "a"}]}
    empty = ("chat_template", "slices", "dtype", "parameters", "evaluate", "tokenizer", "tokenizer_source")
    assert load({**data, **dict.fromkeys(empty)}) == load(data)
    assert load({**data, "tokenizer_source": "base"}) == load({**data, "tokenizer": {"source": "base"}}) != load(data)


def test_none_may_be_written_where_it_is_the_default() -> None:
    data = {"merge_method": "pcb", "base_model": "x", "models": [{"model": "a"}], "parameters": {"clip": None}}
    assert load(data).params(())["clip"] is None


def test_with_method() -> None:
    recipe = load(
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": [{"model": "a", "parameters": {"weight": 2}}, {"task_vector": "b"}],
            "parameters": {"normalize": False, "density": 0.5},
            "exclude": ["x"],
            "seed": 3,
            "dtype": "float16",
            "evaluate": {"suite": "s", "baselines": ["linear"]},
        }
    )
    pcb = recipe.with_method(Baseline("pcb"))
    assert pcb == load(
        {
            "merge_method": "pcb",
            "base_model": "base",
            "models": [{"model": "a"}, {"task_vector": "b"}],
            "exclude": ["x"],
            "seed": 3,
            "dtype": "float16",
        }
    )
    assert pcb.scope == "model"
    with pytest.raises(RecipeError, match="'slerp' has no default for t"):
        recipe.with_method(Baseline("slerp"))
    with pytest.raises(RecipeError, match="no method is called 'leanear'"):
        recipe.with_method(Baseline("leanear"))
    baseless = load({"merge_method": "linear", "models": [{"model": "a"}]})
    with pytest.raises(RecipeError, match="'ties' merges task vectors, and the recipe has no base_model"):
        baseless.with_method(Baseline("ties"))


def test_an_inline_suite_is_kept_and_copied() -> None:
    suite = {"tasks": [{"name": "digits", "kind": "labels", "limit": 100, "share": 0.5}]}
    data = {"merge_method": "linear", "models": [{"model": "a"}], "evaluate": {"suite": suite}}
    recipe = load(data)
    assert recipe.evaluate == Evaluation(suite, ())
    again = recipe.to_dict()
    again["evaluate"]["suite"]["tasks"].clear()
    suite["tasks"].clear()
    assert recipe.to_dict()["evaluate"]["suite"]["tasks"]


def test_to_dict_writes_the_defaults_out() -> None:
    recipe = load({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 3}}]})
    assert recipe.to_dict() == {
        "merge_method": "linear",
        "models": [{"model": "a", "parameters": {"weight": 3.0}}],
        "parameters": {"weight": 1.0, "normalize": True},
        "scope": "tensor",
        "seed": 0,
    }
