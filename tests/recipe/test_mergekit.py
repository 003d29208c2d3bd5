"""Configurations as mergekit's users write them: taken as they are, or refused by name."""

# ruff: noqa: E501  (a table reads best with a case a line)
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mergebench.errors import RecipeError
from mergebench.recipe import load
from mergebench.recipe.stages import default_out

Write = Callable[[str], str]

TIES = """
models:
  - model: mistralai/Mistral-7B-v0.1
    # no parameters necessary for base model
  - model: org/writer-7b
    parameters:
      density: 0.5
      weight: 0.5
  - model: org/coder-7b+org/coder-lora
    parameters:
      density: 0.5
      weight: 0.3
merge_method: ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""

DARE_TIES = """
base_model: google/gemma-2-9b
models:
- model: google/gemma-2-9b
- model: org/gemma-story@v2
  parameters: {density: 0.53, weight: 0.4}
- model: org/gemma-math
  parameters: {density: 0.53, weight: 0.6}
merge_method: dare_ties
parameters:
  int8_mask: true
dtype: bfloat16
out_dtype: float16
tokenizer_source: google/gemma-2-9b
"""

LINEAR = """
merge_method: linear
models:
  - model: ./a
    parameters:
      weight: 1.0
  - model: ./b
    parameters:
      weight: -0.3
dtype: float32
tokenizer:
  source: base
"""

SLERP = """
models:
  - model: org/left
  - model: org/right
merge_method: slerp
base_model: org/left
parameters:
  t: 0.5
dtype: bfloat16
"""


def test_ties(write: Write) -> None:
    recipe = load(write(TIES))
    assert [entry.model for entry in recipe.models] == [
        "mistralai/Mistral-7B-v0.1",
        "org/writer-7b",
        "org/coder-7b+org/coder-lora",
    ]
    assert recipe.models[0].parameters == {}
    assert recipe.params(recipe.models[1:]) == {
        "density": (0.5, 0.5),
        "weight": (0.5, 0.3),
        "lambda": 1.0,
        "normalize": True,
    }
    assert recipe.notes == ("recipe.yaml:16:3: int8_mask: ignored, 'ties' does not take it",)
    assert (recipe.scope, recipe.dtype) == ("tensor", "float16")
    assert recipe.where("models", 2) == "recipe.yaml:8:5"


def test_dare_ties(write: Write) -> None:
    recipe = load(write(DARE_TIES))
    assert recipe.params(recipe.models[1:])["weight"] == (0.4, 0.6)
    assert (recipe.dtype, recipe.out_dtype) == ("bfloat16", "float16")


def test_linear_without_a_base(write: Write) -> None:
    recipe = load(write(LINEAR))
    assert recipe.base_model is None
    assert recipe.params(recipe.models) == {"weight": (1.0, -0.3), "normalize": True}
    assert recipe.notes == ()


def test_slerp(write: Write) -> None:
    recipe = load(write(SLERP))
    assert recipe.params(recipe.models) == {"t": 0.5}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("models:\n", "slices:\n- sources: [{model: a, layer_range: [0, 8]}]\nmodels:\n", "recipe.yaml:1:1: slices: cannot be given with models"),
        ("  normalize: true", "  normalise: true", "recipe.yaml:15:3: parameters.normalise: 'ties' has no such parameter"),
    ],
)  # fmt: skip
def test_what_is_not_taken(write: Write, before: str, after: str, message: str) -> None:
    assert before in TIES
    with pytest.raises(RecipeError) as caught:
        load(write(TIES.replace(before, after)))
    assert caught.value.message.startswith(message)


WRITTEN = """
base_model: org/left
chat_template: null
dtype: float32
merge_method: slerp
models:
- model: org/left
- model:
    lora: null
    model:
      path: org/right
    override_architecture: LlamaForCausalLM
- model:
    lora:
      path: org/lora
      revision: v3
    model:
      path: org/right
      revision: v2
parameters:
  t:
  - filter: mlp
    value: [0, 1]
  - value: 0.5
slices: null
modules: null
tokenizer: null
"""


def test_what_mergekit_writes(write: Write) -> None:
    recipe = load(write(WRITTEN))
    assert [entry.model for entry in recipe.models] == ["org/left", "org/right", "org/right@v2+org/lora@v3"]
    other = load(
        write(WRITTEN.replace("base_model: org/left", "base_model: {model: {path: org/left, revision: null}}"))
    )
    assert other == recipe


def test_a_directory_that_mergekit_wrote(write: Write) -> None:
    write("")
    Path("merges/mine").mkdir(parents=True)
    Path("merges/mine/mergekit_config.yml").write_text(TIES)
    recipe = load("merges/mine")
    assert recipe.merge_method == "ties" and recipe.folders == (Path("merges/mine"),)
    assert recipe.where("models", 2) == "merges/mine/mergekit_config.yml:9:5"
    assert default_out(recipe) == Path("merged/mine")
    with pytest.raises(RecipeError) as caught:
        load("merges")
    assert caught.value.message == "merges: a directory, not a YAML file"
    assert caught.value.hint == "name the file itself, or a directory with a result or mergekit's mergekit_config.yml"


def test_numbers_and_habits_of_published_configs(write: Write) -> None:
    """mergekit stores booleans as numbers; `embed_slerp` stands in many a config, and no version reads it."""
    recipe = load(write(TIES.replace("normalize: true", "normalize: 0.0")))
    assert recipe.params(recipe.models[1:])["normalize"] is False
    with pytest.raises(RecipeError, match=r"must be true or false, got 0\.5"):
        load(write(TIES.replace("normalize: true", "normalize: 0.5")))
    recipe = load(write(SLERP.replace("t: 0.5", "t: 0.5\n  embed_slerp: true")))
    assert recipe.notes == ("recipe.yaml:8:3: embed_slerp: ignored, 'slerp' does not take it",)
