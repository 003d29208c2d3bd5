"""Several modules: each model's parameters hold in the modules that name it, the rest is the base's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_model, write_model
from torch import Tensor

import mergebench
from mergebench.errors import MergebenchError

NAMES = [
    "language_model.model.layers.0.mlp.weight", "language_model.model.layers.1.mlp.weight",
    "language_model.lm_head.weight",
    "vision_tower.encoder.layers.0.fc.weight", "vision_tower.encoder.layers.1.fc.weight",
    "multi_modal_projector.linear.weight",
]  # fmt: skip
QWEN = [
    "model.layers.0.mlp.weight", "model.layers.1.mlp.weight", "lm_head.weight",
    "visual.blocks.0.fc.weight", "visual.blocks.1.fc.weight", "visual.merger.mlp.weight",
]  # fmt: skip
T5 = [
    "decoder.block.0.q.weight", "decoder.block.1.q.weight", "decoder.final_layer_norm.weight",
    "encoder.block.0.q.weight", "encoder.block.1.q.weight", "shared.weight",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(names: list[str]) -> dict[str, dict[str, Tensor]]:
    models = {which: {name: torch.randn(2, 2) for name in names} for which in ("a", "b")}
    for which, tensors in models.items():
        write_model(Path(which), tensors)
    return models


def merged(modules: dict[str, Any], **more: Any) -> dict[str, Tensor]:
    recipe = mergebench.load({"merge_method": "linear", "modules": modules, **more})
    assert mergebench.load(recipe.to_dict()) == recipe
    mergebench.run(mergebench.plan(recipe, device="cpu", workers=1), "out")
    return read_model(Path("out"))


def entries(**weights: Any) -> list[dict[str, Any]]:
    return [{"model": name, "parameters": {"weight": weight}} for name, weight in weights.items()]


LANGUAGE, VISION, PROJECTOR = slice(0, 3), slice(3, 5), slice(5, 6)


@pytest.mark.parametrize(
    ("names", "modules", "shares"),
    [
        (NAMES, {"text_decoder": entries(a=3, b=1), "vision_tower": entries(a=1, b=1)}, (0.25, 0.5, 0)),
        (NAMES, {"vision_tower": entries(a=1, b=3), "multi_modal_projector": entries(a=1)}, (0, 0.75, 0)),
        (NAMES, {"text_decoder": entries(a=1, b=1), "vision_tower": entries(b=1)}, (0.5, 1, 0)),
        (QWEN, {"text_decoder": entries(a=3, b=1), "vision_tower": entries(a=1, b=1)}, (0.25, 0.5, 0)),
        (QWEN, {"vision_tower": entries(a=1, b=1), "multi_modal_projector": entries(b=1)}, (0, 0.5, 1)),
        (QWEN, {"model.layers": entries(b=1), "lm_head": entries(b=1)}, (1, 0, 0)),
        (T5, {"encoder": entries(a=1, b=1), "decoder": entries(a=3, b=1)}, (0.25, 0.5, 0)),
    ],
)
def test_each_module_has_its_own_weights(
    folder: Path, names: list[str], modules: dict[str, Any], shares: tuple[float, float, float]
) -> None:
    models = write(names)
    found = merged({name: {"models": models} for name, models in modules.items()}, base_model="a")
    for part, share in zip((LANGUAGE, VISION, PROJECTOR), shares, strict=True):
        for name in names[part]:
            torch.testing.assert_close(found[name], (1 - share) * models["a"][name] + share * models["b"][name])


def test_precedence_gradients_and_slices(folder: Path) -> None:
    """A source's value goes before its slice's, that before the module's, that before the top's."""
    models = write(NAMES)
    language = {
        "slices": [{"sources": [{"model": "a", "layer_range": [0, 2], "parameters": {"weight": [1, 0]}},
                                {"model": "b", "layer_range": [0, 2]}],
                    "parameters": {"weight": 1}}],
        "parameters": {"weight": 9, "normalize": False},
    }  # fmt: skip
    vision = {"models": [{"model": "b"}], "parameters": {"weight": [{"filter": ".0.", "value": 2}]}}
    modules = {"text_decoder": language, "vision_tower": vision}
    found = merged(modules, base_model="a", parameters={"weight": 3, "normalize": 0.0})
    factors = [(1, 1), (0, 1), (1, 1), (0, 2), (0, 3)]  # the head takes a gradient's first value
    for name, (first, second) in zip(NAMES, factors, strict=False):
        torch.testing.assert_close(found[name], first * models["a"][name] + second * models["b"][name])


def test_methods_without_weights_want_the_same_models(folder: Path) -> None:
    models = write(NAMES)
    both = {"models": [{"model": "b"}]}
    modules = {"text_decoder": both, "vision_tower": both | {"parameters": {"t": 0.25}}}
    found = merged(modules, merge_method="slerp", base_model="a", parameters={"t": 0})
    assert torch.equal(found[NAMES[0]], models["a"][NAMES[0]])
    assert not torch.equal(found[NAMES[3]], models["a"][NAMES[3]])
    modules["vision_tower"] = {"models": [{"model": "a"}]}
    with pytest.raises(MergebenchError, match="module 'vision_tower' does not name this model, and 'slerp' has no"):
        merged(modules, merge_method="slerp", base_model="a", parameters={"t": 0})


SAME = {"models": [{"model": "a"}, {"model": "b"}]}


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"text_decoder": SAME, "vision": SAME}, "no tensor of the base belongs to it"),
        ({"text_decoder": SAME, "vision_tower": {}}, "takes models, or one slice of all its layers"),
        ({"text_decoder": SAME, "vision_tower": {"models": [{"modle": "a"}]}}, "a mapping of model, parameters"),
        ({"text_decoder": SAME, "vision_tower": {"models": [{"model": "a"}] * 2}}, "'a' is listed twice"),
        (
            {"vision_tower": SAME, "text_decoder": {"slices": [{"sources": [{"model": "a", "layer_range": [1, 2]}]}]}},
            r"layers \[1, 2\]: several modules are merged whole",
        ),
        (
            {"vision_tower": SAME, "text_decoder": {"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]}},
            "slices of 1 layers, the base has 2 there",
        ),
        ({"text_decoder": SAME, "vision_tower": SAME | {"sources": []}}, "vision_tower.sources: no such key"),
    ],
)  # fmt: skip
def test_mistakes(folder: Path, modules: dict[str, Any], message: str) -> None:
    write(NAMES)
    with pytest.raises(MergebenchError, match=message):
        merged(modules, parameters={"weight": 1})
