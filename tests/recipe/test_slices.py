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
from mergebench.recipe.ends import comes_before
from tests.recipe.slices import merged, recipe, source, stacked

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import mergekit_cases


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    mergekit_cases.write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


@pytest.mark.parametrize("method", ["slerp", "linear", "task_arithmetic"])
def test_a_slice_of_one_source_is_copied(folder: Path, method: str) -> None:
    """As mergekit has it for slerp; the last slice gives what comes after the layers."""
    slices = [[source("base", 0, 2), source("ft1", 0, 2)], [source("ft2", 2, 4)]]
    more = {"parameters": {"t": 0.5} if method == "slerp" else {"weight": 0.5}}
    more |= {} if method == "linear" else {"base_model": "base"}
    found = merged(recipe(method, *slices, **more))
    base, first, last = (read_model(folder / name) for name in ("base", "ft1", "ft2"))
    for name, value in found.items():
        mixed = "embed" in name or ".0." in name or ".1." in name
        expected = (base[name] + first[name]) / 2 if mixed else last[name]
        torch.testing.assert_close(
            value, expected, atol=2e-3 if method == "slerp" and mixed else 0, rtol=0 if not mixed else 2e-2
        )
    notes = mergebench.plan(mergebench.load(recipe(method, *slices, **more))).merge.notes
    assert any("slices.1" in note or "one source" in note for note in notes)


BEFORE = [
    ("gpt_neox", "gpt_neox.embed_in.weight"),
    ("opt", "model.decoder.project_in.weight"),
    ("bart", "model.decoder.layernorm_embedding.weight"),
    ("bert", "bert.embeddings.LayerNorm.weight"),
    ("roberta-prelayernorm", "roberta_prelayernorm.embeddings.LayerNorm.weight"),
    ("modernbert-decoder", "model.embeddings.norm.weight"),
    ("ctrl", "transformer.w.weight"),
]
AFTER = [
    ("gpt_neox", "embed_out.weight"),
    ("lfm2", "model.embedding_norm.weight"),
    ("opt", "model.decoder.project_out.weight"),
    ("bigbird_pegasus", "model.decoder.layernorm_embedding.weight"),
    ("bert", "cls.predictions.transform.LayerNorm.weight"),
    ("roberta-prelayernorm", "roberta_prelayernorm.LayerNorm.weight"),
    ("modernbert-decoder", "decoder.weight"),
    ("ctrl", "transformer.layernorm.weight"),
]


def test_what_stands_before_and_after_the_layers() -> None:
    """As transformers runs them: test_slices_sweep.py holds every architecture."""
    assert [name for kind, name in BEFORE if comes_before(name, kind) is not True] == []
    assert [name for kind, name in AFTER if comes_before(name, kind) is not False] == []
    assert comes_before("model.alpha") is None


def test_a_tied_head_is_not_taken_from_another_model_than_its_embedding(folder: Path) -> None:
    for name in "ab":
        names = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.w", "model.layers.1.w"]
        config = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": True}
        write_model(folder / name, dict.fromkeys(names, torch.full((2, 2), float(ord(name)))), config=config)
    assert "lm_head.weight" not in merged(stacked(("a", 0, 1), ("b", 1, 2)))


@pytest.mark.parametrize("apart", [False, None], ids=["config says it", "by default"])
@pytest.mark.parametrize("twice", [False, True], ids=["stored once", "stored twice"])
@pytest.mark.parametrize("first", ["tied", "apart"])
def test_a_tied_model_beside_one_with_its_head_apart(folder: Path, first: str, twice: bool, apart: bool | None) -> None:
    """The head is the last model's, which is the embedding where that ties them; config.json says that it is apart."""
    about = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4}
    settings = json.loads((folder / "base" / "config.json").read_text()) | about
    base = read_model(folder / "base")
    tied = {name: value + 1 for name, value in base.items() if name != "lm_head.weight"}
    more = {"lm_head.weight": tied["model.embed_tokens.weight"].clone()} if twice else {}
    write_model(folder / "tied", tied | more, config=settings | {"tie_word_embeddings": True})
    said = {} if apart is None else {"tie_word_embeddings": apart}
    own = {"lm_head.weight": base["model.embed_tokens.weight"] * 2}
    write_model(folder / "apart", base | own, config={k: v for k, v in settings.items() if k[:4] != "tie_"} | said)
    models = {"tied": tied | {"lm_head.weight": tied["model.embed_tokens.weight"]}, "apart": base | own}
    second = "apart" if first == "tied" else "tied"

    found = merged(stacked((first, 0, 2), (second, 2, 4)))
    assert torch.equal(found["lm_head.weight"], models[second]["lm_head.weight"])
    assert torch.equal(found["model.embed_tokens.weight"], models[first]["model.embed_tokens.weight"])
    written = json.loads((folder / "out" / "config.json").read_text())
    assert written.get("tie_word_embeddings", apart) is (False if first == "tied" else apart)

    plan = mergebench.plan(mergebench.load(recipe("linear", [source(first, 0, 4), source(second, 0, 4)])))
    found = read_model(mergebench.run(plan, "out", overwrite=True).out)
    for name, value in found.items():
        torch.testing.assert_close(value, (models["tied"][name] + models["apart"][name]) / 2)
    assert "lm_head.weight" in found and not any("tie_word" in note for note in plan.merge.notes if apart is False)


def test_a_name_that_does_not_tell_is_noted(folder: Path) -> None:
    for seed, name in enumerate("ab"):
        tensors = {"strange": torch.full((2,), float(seed))} | {f"layers.{at}.w": torch.ones(2) for at in range(2)}
        write_model(folder / name, tensors, config=None)
    plan = mergebench.plan(mergebench.load(stacked(("a", 0, 1), ("b", 1, 2))))
    assert plan.merge.notes == (
        "strange: before the layers or after them? Taken from the last slice, as what comes after",
    )


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


def test_a_slice_with_fewer_sources_is_merged_in_a_document_of_its_own(folder: Path) -> None:
    """As the hint says; by hand, every layer is the mean of its own sources."""
    with pytest.raises(MergebenchError) as caught:
        mergebench.load(recipe("linear", *UNEQUAL))
    assert "in a document of its own" in str(caught.value.hint)
    pair = recipe("linear", UNEQUAL[2]) | {"name": "pair"}
    last = recipe("linear", *UNEQUAL[:2], [source("pair", 0, 2)])
    Path("recipe.yaml").write_text(f"{json.dumps(pair)}\n---\n{json.dumps(last)}\n")
    for stage in mergebench.load_stages("recipe.yaml", "out"):
        found = read_model(mergebench.run(mergebench.plan(stage.recipe), stage.out).out)
    base, first, second = (read_model(folder / name) for name in ("base", "ft1", "ft2"))
    for name, value in found.items():
        before = "embed" in name or ".0." in name
        expected = (base[name] + first[name] + second[name]) / 3 if before else (first[name] + second[name]) / 2
        torch.testing.assert_close(value, first[name] if ".1." in name else expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (recipe("linear", [source("ft1", 0, 9)]), "recipe: slices.0.sources.0.layer_range: [0, 9]: ft1 has 4 layers"),
        (recipe("linear", *UNEQUAL), "slices.2: has 2 sources, another slice has 3: the slices of a merge have as"),
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
