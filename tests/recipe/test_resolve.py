"""Which models a recipe merges: how a base counts that is listed, or is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergebench.engine.plan import plan_merge
from mergebench.errors import RecipeError
from mergebench.recipe import load
from mergebench.recipe.resolve import resolve


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four models in the working directory: a, b, c and base."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(["base", "a", "b", "c"]):
        (tmp_path / name).mkdir()
        values = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        save_file({"w": values}, tmp_path / name / "model.safetensors")


def recipe(method: str, names: str, base: str | None = None, **parameters: Any) -> dict[str, Any]:
    listed = {"merge_method": method, "models": [{"model": name} for name in names.split()], "parameters": parameters}
    return listed if base is None else {**listed, "base_model": base}


@pytest.mark.parametrize(
    ("method", "listed", "base", "merged"),
    [
        ("karcher", "a b", None, "a b"),
        ("karcher", "a b", "base", "base a b"),  # one more
        ("karcher", "a base b", "base", "a base b"),
        ("linear", "a b", "base", "a b"),
        ("linear", "a base b", "base", "a base b"),
        ("multislerp", "a b c", None, "a b c"),
        ("multislerp", "a base b", "base", "a b"),
        ("nuslerp", "a b", None, "a b"),
        ("nuslerp", "a b", "base", "a b"),
        ("nuslerp", "base a b", "base", "a b"),
        ("model_stock", "a base b", "base", "a b"),
        ("nearswap", "a", "base", "a"),
        ("nearswap", "a base", "base", "a"),
        ("arcee_fusion", "a", "base", "base a"),
        ("arcee_fusion", "a base", "base", "base a"),
        ("passthrough", "a", None, "a"),
        ("passthrough", "a", "a", "a"),
    ],
)
def test_a_base_listed_or_not(method: str, listed: str, base: str | None, merged: str) -> None:
    given = {"t": 0.1} if method == "nearswap" else {}
    merge = resolve(load(recipe(method, listed, base, **given)))

    assert " ".join(merge.names) == merged
    assert plan_merge(merge).elements == 20


@pytest.mark.parametrize(
    ("method", "listed", "base", "message", "hint"),
    [
        ("nuslerp", "a b c", None, "models: 'nuslerp' takes exactly 2 models, got 3", None),
        ("nuslerp", "a b", "a", "models: 'nuslerp' takes exactly 2 models besides the base, got 1", None),
        ("nearswap", "a b", "base", "models: 'nearswap' takes exactly 1 model besides the base, got 2", None),
        ("arcee_fusion", "a", None, "models: 'arcee_fusion' takes exactly 2 models, got 1", None),
        (
            "passthrough",
            "a",
            "base",
            "models: 'passthrough' takes exactly 1 model, got 2",
            "base_model counts as one of them",
        ),
        (
            "model_stock",
            "a base",
            "base",
            "models: 'model_stock' takes at least 2 models besides the base, got 1",
            "add a fine-tune",
        ),
    ],
)
def test_a_wrong_number_of_models(method: str, listed: str, base: str | None, message: str, hint: str | None) -> None:
    given = {"t": 0.1} if method == "nearswap" else {}
    with pytest.raises(RecipeError) as caught:
        plan_merge(resolve(load(recipe(method, listed, base, **given))))
    assert (caught.value.message, caught.value.hint) == (message, hint)


@pytest.mark.parametrize("method", ["model_stock", "nearswap"])
def test_a_base_that_is_missing(method: str) -> None:
    given = {"t": 0.1} if method == "nearswap" else {}
    with pytest.raises(RecipeError, match=f"base_model: missing, '{method}' merges task vectors"):
        load(recipe(method, "a b", **given))


@pytest.mark.parametrize(
    ("method", "given", "piece"),
    [
        ("arcee_fusion", {}, "row"),
        ("della", {"density": 0.5}, "row"),
        ("della_linear", {"density": 0.5}, "row"),
        ("model_stock", {"filter_wise": True}, "row"),
        ("knots", {}, "tensor"),
    ],
)
def test_a_scope_that_cannot_be(method: str, given: dict[str, Any], piece: str) -> None:
    data = {**recipe(method, "a" if method == "arcee_fusion" else "a b", "base", **given), "scope": "model"}
    with pytest.raises(RecipeError, match=f"scope: '{method}' works on one {piece} at a time") as caught:
        resolve(load(data))
    assert caught.value.hint == "take out scope: model"


def test_a_head_that_include_leaves_out_is_said() -> None:
    """A fine-tune untied from its embedding: the result would have the base's head without a word."""
    save_file({"w": torch.ones(4, 5), "lm_head.weight": torch.ones(6, 5)}, Path("a/model.safetensors"))
    Path("a/config.json").write_text('{"tie_word_embeddings": false}')
    noted = "a: lm_head.weight: a head of its own, which include leaves out; the result has the base's"

    assert resolve(load(recipe("linear", "a b", "base") | {"include": ["w"]})).notes == (noted,)
    assert resolve(load(recipe("linear", "a b", "base") | {"exclude": ["lm_head.*"]})).notes == ()


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_what_transformers_keeps_in_float32_stays_so(key: str) -> None:
    """The bias that DeepSeek's router adds: a rounded one sends tokens to other experts."""
    bias = "model.layers.0.mlp.gate.e_score_correction_bias"
    for name in ("base", "a"):
        save_file({"w": torch.ones(4, 5), bias: torch.ones(4)}, Path(name) / "model.safetensors")
    plan = plan_merge(resolve(load(recipe("linear", "a", "base") | {key: "bfloat16"})))

    assert plan.dtypes == {"w": "BF16", bias: "F32"}
