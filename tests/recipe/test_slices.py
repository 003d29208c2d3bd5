"""Slices: layers of several models as one; numbers are held against mergekit's in test_mergekit_numbers.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import hashes, read_model, write_model

import mergebench
from mergebench.errors import MergebenchError

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import mergekit_cases


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    mergekit_cases.write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def source(model: str, first: int, end: int, **more: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, end], **more}


def recipe(method: str, *slices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "slices": [{"sources": sources} for sources in slices], **more}


def merged(data: dict[str, Any]) -> dict[str, torch.Tensor]:
    return read_model(mergebench.run(mergebench.plan(mergebench.load(data)), "out").out)


def test_layers_are_stacked_and_the_config_says_how_many(folder: Path) -> None:
    config = json.loads((folder / "ft1" / "config.json").read_text())
    (folder / "ft1" / "config.json").write_text(json.dumps(config | {"layer_types": ["a", "b", "c", "d"]}))
    before = hashes(folder / "ft1") | hashes(folder / "ft2")

    found = merged(recipe("linear", [source("ft1", 0, 3)], [source("ft2", 1, 4)]))

    first, second = read_model(folder / "ft1"), read_model(folder / "ft2")
    for name, value in found.items():
        parts = name.split(".")
        if parts[1] == "layers":
            layer = int(parts[2])
            parts[2] = str(layer if layer < 3 else layer - 2)
            expected = (first if layer < 3 else second)[".".join(parts)]
        else:
            expected = (first if "embed" in name else second)[name]
        assert torch.equal(expected, value)
    assert len(found) == len(first) + 2 * 9
    config = json.loads((folder / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["layer_types"]) == (6, ["a", "b", "c", "b", "c", "d"])
    assert [path.name for path in (folder / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert before == hashes(folder / "ft1") | hashes(folder / "ft2")


def test_the_result_loads_in_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    merged(recipe("linear", [source("ft1", 0, 3), source("ft2", 0, 3)], [source("ft2", 1, 4), source("base", 0, 3)]))
    model, info = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert model.config.num_hidden_layers == 6
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_base_is_the_source_that_names_it_wherever_it_stands(folder: Path) -> None:
    slices = [[source("base", 0, 2), source("ft1", 0, 2)], [source("ft1", 2, 4), source("base", 2, 4)]]
    found = merged(recipe("task_arithmetic", *slices, base_model="base", parameters={"weight": 0.5}))
    base, tuned = read_model(folder / "base"), read_model(folder / "ft1")
    for name, value in found.items():
        torch.testing.assert_close(base[name] + 0.5 * (tuned[name] - base[name]), value)


def test_a_slice_of_one_layer_takes_a_gradients_last_value(folder: Path) -> None:
    """As mergekit has it."""
    slices = [[source(model, layer, layer + 1) for model in ("base", "ft1")] for layer in range(4)]
    found = merged(recipe("slerp", *slices, base_model="base", parameters={"t": [0.0, 1.0]}))
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(read_model(folder / "ft1")[name], found[name])
    assert torch.equal(read_model(folder / "base")["model.norm.weight"], found["model.norm.weight"])


def test_round_trip(folder: Path) -> None:
    data = recipe(
        "linear",
        [source("ft1", 0, 2, parameters={"weight": 0.5})],
        [source("ft2", 2, 4)],
        parameters={"weight": [0.1, 1]},
    )
    loaded = mergebench.load(data)
    assert mergebench.load(loaded.to_dict()) == loaded
    assert [entry.model for entry in loaded.models] == ["ft1", "ft2"]


UNEQUAL = [
    [source("ft1", 0, 1), source("ft2", 0, 1), source("base", 0, 1)],
    [source("ft1", 1, 2)],
    [source("ft1", 2, 4), source("ft2", 2, 4)],
]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (recipe("linear", [source("ft1", 0, 9)]), "recipe: slices.0.sources.0.layer_range: ft1 has no layer 4"),
        (recipe("linear", *UNEQUAL), "slices.2: has 2 sources, another slice has 3: give it 3, or 1"),
        (recipe("ties", [source("ft1", 0, 2)], base_model="base"), "the base_model must be one of the sources"),
        (recipe("linear", [source("heap", 0, 2)]), "it has 'decoder', 'encoder'"),
        (recipe("linear", [source("nowhere", 0, 2)]), "nowhere"),
    ],
)
def test_mistakes(folder: Path, data: dict[str, Any], message: str) -> None:
    write_model(folder / "heap", {"encoder.0.w": torch.ones(2), "decoder.0.w": torch.ones(2)})
    with pytest.raises(MergebenchError) as caught:
        mergebench.plan(mergebench.load(data))
    assert message in caught.value.message


def test_a_missing_model_is_named_where_it_stands(folder: Path) -> None:
    lines = ["merge_method: linear", "slices:", "- sources:"]
    lines += [f"  - {{model: {model}, layer_range: [0, 2]}}" for model in ("ft1", "ft9")]
    Path("recipe.yaml").write_text("\n".join(lines))
    with pytest.raises(MergebenchError, match=r"recipe.yaml:5:6: model 'ft9'"):
        mergebench.plan(mergebench.load("recipe.yaml"))


def test_the_output_may_not_be_an_input(folder: Path) -> None:
    data = recipe("linear", [source("ft1", 0, 2)], [source("ft2", 2, 4)])
    plan = mergebench.plan(mergebench.load(data))
    for model in ("ft1", "ft2"):
        with pytest.raises(MergebenchError, match="input"):
            mergebench.run(plan, model, overwrite=True)
