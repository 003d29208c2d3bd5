"""Slices of models with layers of more than one kind, and what config.json says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_model, write_model

import mergebench
from mergebench.errors import MergebenchError
from tests.recipe.slices import DENSE, MIXED, MOE, SPARSE, merged, recipe, source, stacked, write_mixed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_slices_over_all_layers_of_several_kinds_are_the_models_whole(folder: Path) -> None:
    for seed, name in enumerate("ab"):
        write_mixed(folder / name, seed, MOE)
    parameters = {"t": [{"filter": "mlp", "value": [0, 0.3, 1]}, {"value": 0.5}]}
    more = {"base_model": "a", "parameters": parameters}
    found = merged(recipe("slerp", [source("a", 0, 4), source("b", 0, 4)], **more))
    data = {"merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}], **more}
    whole = read_model(mergebench.run(mergebench.plan(mergebench.load(data)), "whole").out)
    assert found.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in found.items())


def test_a_count_in_the_config_follows_the_layers(folder: Path) -> None:
    write_mixed(folder / "a", 0, MOE | {"moe_layers": [1, 2, 3]})
    write_mixed(
        folder / "b", 1, MOE | {"first_k_dense_replace": 2, "moe_layers": [2, 3]}, [DENSE, DENSE, SPARSE, SPARSE]
    )
    found = merged(stacked(("a", 0, 1), ("b", 1, 2), ("a", 1, 4)))
    config = json.loads((folder / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["first_k_dense_replace"], config["moe_layers"]) == (5, 2, [2, 3, 4])
    assert "model.layers.1.mlp.up_proj.weight" in found and "model.layers.2.mlp.gate.weight" in found


NEXT = MOE | {"num_nextn_predict_layers": 1, "layer_types": ["f"] * 5, "first_k_dense_replace": 0}


@pytest.mark.parametrize(
    ("config", "more", "what"),
    [
        (NEXT, ["model.layers.4.mlp.up_proj.weight", "model.layers.4.eh_proj.weight"], "model.layers.4"),
        ({"model_type": "qwen3_5", "text_config": {"num_hidden_layers": 4, "mtp_num_hidden_layers": 1}},
         ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"], "mtp"),
        ({"num_hidden_layers": 4}, ["model.mtp_layers.0.w"], "model.mtp_layers"),
    ],
)  # fmt: skip
def test_layers_that_predict_more_tokens_are_left_out_with_a_note(
    folder: Path, config: dict[str, Any], more: list[str], what: str
) -> None:
    for seed, name in enumerate("ab"):
        write_mixed(folder / name, seed, config, [DENSE] * 4)
        write_model(folder / name, read_model(folder / name) | dict.fromkeys(more, torch.ones(2)), config=config)
    plan = mergebench.plan(mergebench.load(recipe("linear", [source("a", 0, 4), source("b", 0, 4)])))
    note = f"{what}: multi-token prediction, after the layers that slices name: left out"
    assert {f"a: {note}", f"b: {note}"} <= set(plan.merge.notes)
    mergebench.run(plan, "out")
    assert note in (folder / "out" / "README.md").read_text().replace("\\", "")
    assert read_model(folder / "out").keys() == read_model(folder / "a").keys() - {*more}
    written = json.loads((folder / "out" / "config.json").read_text())
    written |= written.get("text_config", {})
    assert not any(value for key, value in written.items() if "mtp" in key or "nextn" in key)
    assert written["num_hidden_layers"] == 4 and len(written.get("layer_types", "four")) == 4


def test_layers_that_predict_more_tokens_keep_their_place(folder: Path) -> None:
    write_mixed(folder / "a", 0, NEXT, [DENSE] * 5)
    assert merged(stacked(("a", 0, 2), ("a", 2, 5))).keys() == read_model(folder / "a").keys()
    assert json.loads((folder / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    with pytest.raises(MergebenchError, match="layer 4 of a would be layer 3, and it predicts more tokens"):
        mergebench.plan(mergebench.load(stacked(("a", 0, 2), ("a", 3, 5))))


JAMBA = {"model_type": "jamba", "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
NO_KEY = {"model_type": "new", "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("config", "ranges", "message"),
    [
        (MOE, [("a", 0, 4), ("a", 0, 4)], "layer 0 of a would be layer 4, another kind of layer by first_k_dense_re"),
        (
            JAMBA,
            [("a", 0, 2), ("a", 1, 4)],
            "layer 1 of a would be layer 2, another kind of layer by attn_layer_period",
        ),
        (JAMBA, [("a", 0, 4), ("a", 2, 4)], None),
        (NO_KEY, [("a", 1, 4)], "layer 1 of a would be layer 0, and nothing known in config.json says"),
        (NO_KEY, [("a", 0, 4), ("a", 2, 4)], None),
        ({"model_type": "gemma2", "num_hidden_layers": 4}, [("a", 0, 2), ("a", 1, 4)], "by model_type: gemma2"),
        ({"model_type": "new", "levels": 4}, [("a", 1, 3)], "nothing known in config.json says"),
        (MOE | {"hidden_size_per_layer_input": 2}, [("a", 0, 2)], "tensors with a part for each layer"),
    ],
)
def test_a_config_that_cannot_describe_the_layers(
    folder: Path, config: dict[str, Any], ranges: list[tuple[str, int, int]], message: str | None
) -> None:
    kinds = [DENSE, SPARSE] * 2 if config is JAMBA else [DENSE] * 4 if "gemma2" in str(config) else MIXED
    write_mixed(folder / "a", 0, config, kinds)
    if message is None:
        merged(stacked(*ranges))
        return
    with pytest.raises(MergebenchError) as caught:
        mergebench.plan(mergebench.load(stacked(*ranges)))
    assert message in caught.value.message


def test_a_config_without_a_number_of_layers_is_noted(folder: Path) -> None:
    write_mixed(folder / "a", 0, {"model_type": "new", "levels": 4}, [DENSE] * 4)
    notes = mergebench.plan(mergebench.load(stacked(("a", 0, 2)))).merge.notes
    assert notes == ("a: no known key of config.json is the number of layers: it does not say 2",)


def test_lists_of_layers_are_those_of_the_layers_models(folder: Path) -> None:
    config = {"model_type": "x", "num_hidden_layers": 4, "eos_token_id": [1, 2, 3, 4]}
    write_mixed(folder / "a", 0, config | {"layer_types": ["f", "s", "s", "f"]}, [DENSE] * 4)
    write_mixed(folder / "b", 1, config | {"layer_types": ["s", "s", "f", "f"]}, [DENSE] * 4)
    merged(stacked(("a", 0, 2), ("b", 1, 4)))
    written = json.loads((folder / "out" / "config.json").read_text())
    assert written["layer_types"] == ["f", "s", "s", "f", "f"]
    assert written["eos_token_id"] == [1, 2, 3, 4]
    with pytest.raises(MergebenchError, match="layer 0 of a and layer 1 of b are of different kinds, by layer_types"):
        mergebench.plan(mergebench.load(recipe("linear", [source("a", 0, 3), source("b", 1, 4)])))


def test_sources_of_one_slice_have_equal_kinds_of_layers(folder: Path) -> None:
    for seed, name in enumerate("ab"):
        write_mixed(folder / name, seed, MOE)
    what = "recipe: slices.0: layer 0 of a and layer 1 of b are of different kinds: only layer 0 of a has mlp.up_proj"
    with pytest.raises(MergebenchError, match=what):
        mergebench.plan(mergebench.load(recipe("linear", [source("a", 0, 3), source("b", 1, 4)])))


def test_fewer_layers_of_kinds_that_no_config_tells(folder: Path) -> None:
    write_mixed(folder / "a", 0, NO_KEY, [DENSE, SPARSE] * 2)
    with pytest.raises(MergebenchError, match=r"slices: 2 layers in place of 4, and nothing known in config\.json"):
        mergebench.plan(mergebench.load(stacked(("a", 0, 2))))


def test_a_list_of_layers_is_their_number_where_nothing_else_is(folder: Path) -> None:
    """Nemotron-H, as transformers 5 writes it."""
    config = {"model_type": "nemotron_h", "layers_block_type": ["moe", "mlp"], "mtp_layers_block_type": ["x", "y"]}
    write_mixed(folder / "a", 0, config, [SPARSE, DENSE])
    merged(stacked(("a", 0, 2), ("a", 1, 2)))
    written = json.loads((folder / "out" / "config.json").read_text())
    assert written["layers_block_type"] == ["moe", "mlp", "mlp"]
    assert written["mtp_layers_block_type"] == ["x", "y"]
    assert "num_hidden_layers" not in written
