"""LoRA directories made by PEFT: what we fold is what its merge_and_unload gives."""

from __future__ import annotations

import dataclasses
import json
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import read_model, write_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergebench
from mergebench.checkpoint import delta as protocol
from mergebench.checkpoint.files import Files
from mergebench.checkpoint.fp8 import Scales
from mergebench.checkpoint.values import chain
from mergebench.deltas.low_rank import Factors, factors, low_rank
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError

LLAMA = transformers.LlamaConfig(
    vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=24, max_position_embeddings=32,
)  # fmt: skip
GPT2 = transformers.GPT2Config(vocab_size=48, n_positions=16, n_embd=16, n_layer=2, n_head=2)
BERT = transformers.BertConfig(
    vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
)
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
CONV = {"r": 3, "lora_alpha": 5, "fan_in_fan_out": True}

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (LLAMA, {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS}),
    "rank-stabilised": (LLAMA, {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, "use_rslora": True}),
    "patterns": (
        LLAMA,
        {
            "r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS,
            "rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 7},
            "alpha_pattern": {"layers.0.mlp.down_proj": 9, "q_proj": 1, r".*\.1\.self_attn\.v_proj": 5},
        },
    ),
    "patterns, rank-stabilised": (
        LLAMA,
        {
            "r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True,
            "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 32},
        },
    ),
    "some layers": (LLAMA, {"r": 2, "target_modules": PROJECTIONS, "layers_to_transform": [1]}),
    "gaussian": (LLAMA, {"r": 2, "target_modules": PROJECTIONS, "init_lora_weights": "gaussian"}),
    "orthogonal": (LLAMA, {"r": 2, "target_modules": PROJECTIONS, "init_lora_weights": "orthogonal"}),
    "untied head": (LLAMA, {"r": 2, "target_modules": ["lm_head", "q_proj"]}),
    "Conv1D": (GPT2, {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "square Conv1D": (GPT2, {"r": 3, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True, "use_rslora": True}),
    "encoder": (BERT, {"r": 4, "lora_alpha": 8, "target_modules": ["query", "dense"]}),
    "DoRA": (LLAMA, {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, "use_dora": True}),
    "DoRA, rank-stabilised, patterns": (
        LLAMA,
        {
            "r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, "use_dora": True, "use_rslora": True,
            "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3},
        },
    ),
    "DoRA, Conv1D": (GPT2, CONV | {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "DoRA, square Conv1D": (GPT2, CONV | {"target_modules": ["attn.c_proj"], "use_dora": True}),
    "bias of B": (BERT, {"r": 4, "lora_alpha": 6, "target_modules": ["query", "dense"], "lora_bias": True}),
    "bias of B, Conv1D": (GPT2, CONV | {"target_modules": ["c_attn"], "lora_bias": True, "use_rslora": True}),
    "biases of the adapted": (BERT, {"r": 4, "target_modules": ["query", "dense"], "bias": "lora_only"}),
    "all biases": (GPT2, CONV | {"target_modules": ["c_attn"], "bias": "all"}),
    "modules saved whole": (LLAMA, {"r": 2, "target_modules": PROJECTIONS, "modules_to_save": ["lm_head", "norm"]}),
    "a pooler saved whole": (BERT, {"r": 2, "target_modules": ["query"], "modules_to_save": ["pooler"]}),
}  # fmt: skip


def train(model: Any, seed: int = 1) -> None:
    """Factors that are not zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "magnitude" in name:
                value.mul_(1 + 0.3 * torch.randn_like(value))
            elif "lora_" in name:
                value.copy_(0.3 * torch.randn_like(value))
            elif value.requires_grad:  # a bias, a module saved whole
                value.add_(0.3 * torch.randn_like(value))


def make(
    folder: Path, config: Any, settings: dict[str, Any], dtype: torch.dtype = torch.float32, **how: Any
) -> dict[str, Tensor]:
    """A base, an adapter on it, both saved; what PEFT makes of the two, as saved."""
    auto = transformers.AutoModel if config is BERT else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    auto.from_config(config).to(dtype).save_pretrained(folder / "base")
    with warnings.catch_warnings(action="ignore"):
        model = get_peft_model(auto.from_pretrained(folder / "base"), LoraConfig(**settings))
        train(model)
        model.save_pretrained(folder / "lora", **{"save_embedding_layers": False, **how})
        again = PeftModel.from_pretrained(auto.from_pretrained(folder / "base"), folder / "lora")
        again.merge_and_unload().save_pretrained(folder / "folded")
    return read_model(folder / "folded")


def fold(folder: Path) -> dict[str, Tensor]:
    return open_model(f"{folder / 'base'}+{folder / 'lora'}").state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_folds_like_peft(tmp_path: Path, kind: str) -> None:
    expected = make(tmp_path, *KINDS[kind])
    base, folded = read_model(tmp_path / "base"), fold(tmp_path)
    assert folded.keys() == expected.keys()
    changed = [name for name in base if not torch.equal(base[name], folded[name])]
    assert changed == [name for name in base if not torch.equal(base[name], expected[name])] and changed
    for name, value in folded.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["patterns", "Conv1D", "DoRA", "DoRA, Conv1D", "bias of B", "all biases"])
def test_merges_like_peft(tmp_path: Path, kind: str) -> None:
    """A recipe with BASE+ADAPTER gives what it gives with the folded model."""
    make(tmp_path, *KINDS[kind])
    adapted, folded = f"{tmp_path / 'base'}+{tmp_path / 'lora'}", str(tmp_path / "folded")
    results = []
    for number, model in enumerate((adapted, folded)):
        for method in ("linear", "task_arithmetic"):
            recipe = {
                "merge_method": method,
                "base_model": str(tmp_path / "base"),
                "models": [{"model": model, "parameters": {"weight": 0.7}}, {"model": str(tmp_path / "folded")}],
            }
            plan = mergebench.plan(mergebench.load(recipe), device="cpu")
            results.append(read_model(mergebench.run(plan, tmp_path / f"{method}{number}").out))
    for one, other in ((results[0], results[2]), (results[1], results[3])):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["DoRA", "modules saved whole", "biases of the adapted"])
def test_merges_without_a_base(tmp_path: Path, kind: str) -> None:
    """The model with the adapter gives the layout: the base's file, order and types."""
    expected = make(tmp_path, *KINDS[kind], dtype=torch.bfloat16 if kind == "modules saved whole" else torch.float32)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": f"{tmp_path / 'base'}+{tmp_path / 'lora'}"}, {"model": str(tmp_path / "folded")}],
    }
    out = mergebench.run(mergebench.plan(mergebench.load(recipe), device="cpu"), tmp_path / "out").out
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    layouts = [
        [(t.name, t.dtype) for t in open_model(str(place)).tensors.values()] for place in (tmp_path / "base", out)
    ]
    assert layouts[0] == layouts[1]
    for name, value in read_model(out).items():
        close = {"rtol": 2e-2, "atol": 1e-3} if value.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(value, expected[name], **close)


def test_half_precision_is_added_in_float32(tmp_path: Path) -> None:
    """base + delta is not rounded to the base's type before it is merged."""
    make(tmp_path, *KINDS["plain"], dtype=torch.bfloat16)
    base, factors = read_model(tmp_path / "base"), load_file(tmp_path / "lora" / "adapter_model.safetensors")
    folded = fold(tmp_path)
    for name, value in folded.items():
        expected = base[name].float()
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in factors:
            a, b = (factors[f"{stem}.lora_{letter}.weight"].float() for letter in "AB")
            expected = expected + (b @ a) * 1.5
            assert not torch.equal(value, value.bfloat16().float())
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("adapter_name", ["", ".default"])
def test_spellings_of_the_factors(tmp_path: Path, prefix: str, adapter_name: str) -> None:
    expected = make(tmp_path, *KINDS["plain"])
    file = tmp_path / "lora" / "adapter_model.safetensors"
    factors = {
        prefix + name.removeprefix("base_model.model.").replace(".weight", f"{adapter_name}.weight"): value
        for name, value in load_file(file).items()
    }
    save_file(factors, file)
    for name, value in fold(tmp_path).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", ["drop", "add"])
def test_a_prefix_more_or_less(tmp_path: Path, change: str) -> None:
    """An adapter trained on the bare encoder, for a base stored with its head, and the other way round."""
    expected = make(tmp_path, *KINDS["plain"])
    base = read_model(tmp_path / "base")
    rename = (lambda name: name.removeprefix("model.")) if change == "drop" else (lambda name: f"wrapped.{name}")
    write_model(tmp_path / "base", {rename(name): value for name, value in base.items()})
    folded = fold(tmp_path)
    for name, value in expected.items():
        torch.testing.assert_close(folded[rename(name)], value, rtol=1e-5, atol=1e-6)


# -- borders of chunks -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_split_gives_the_same_bits(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Rows are computed in fixed tiles: where a chunk ends cannot change an element."""
    with mock.patch.object(protocol, "TILE", data.draw(st.integers(1, 300))):
        _any_split(tmp_path_factory, data)


def _any_split(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 100))
    columns, rank = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 8))
    conv = data.draw(st.booleans())
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(rows * columns + rank)
    dora = data.draw(st.booleans())
    _write_adapter(folder, rows, columns, rank, fan_in_fan_out=conv, use_dora=dora)
    model = open_model(f"{folder / 'base'}+{folder / 'lora'}")
    whole = model.state_dict()["layer.weight"].reshape(-1)
    cuts = data.draw(st.lists(st.integers(0, rows * columns), max_size=6))
    edges = [0, *sorted(cuts), rows * columns]
    with Files() as files:
        reader = chain(files, Scales(files), model.tensors["layer.weight"], model.deltas["layer.weight"])
        delta, added, folded = torch.zeros(rows * columns), torch.zeros(rows * columns), torch.empty(rows * columns)
        reader.add_into(0, delta)
        for start, stop in pairwise(edges):
            reader.add_into(start, added[start:stop])
            reader.read(start, folded[start:stop])
    assert torch.equal(added, delta)
    assert torch.equal(folded, whole)
    factors = load_file(folder / "lora" / "adapter_model.safetensors")
    product = factors["layer.lora_B.weight"].double() @ factors["layer.lora_A.weight"].double() * (3 / rank)
    expected = product.T if conv else product
    if dora:
        base = read_model(folder / "base")["layer.weight"].double()
        norms = (base + expected).norm(dim=0 if conv else 1, keepdim=True)
        magnitude = factors["layer.lora_magnitude_vector"].double()
        expected = (magnitude if conv else magnitude[:, None]) / norms * (base + expected) - base
    torch.testing.assert_close(delta.double(), expected.reshape(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [8, 16, 64])
def test_where_a_piece_lies_in_memory_cannot_change_a_bit(tmp_path: Path, rank: int) -> None:
    """Of whole tiles too, which are folded where they lie: a product with a vector begins at a border of its own."""
    torch.manual_seed(rank)
    _write_adapter(tmp_path, 12, 333, rank)
    model = open_model(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")
    with mock.patch.object(protocol, "TILE", 333), Files() as files:
        whole = model.state_dict()["layer.weight"].reshape(-1)
        reader = chain(files, Scales(files), model.tensors["layer.weight"], model.deltas["layer.weight"])
        for start in range(64):
            piece = torch.empty(len(whole) - start)
            reader.read(start, piece)
            assert torch.equal(piece, whole[start:])


def _write_adapter(folder: Path, rows: int, columns: int, rank: int, **config: Any) -> None:
    wide, high = (rows, columns) if config.get("fan_in_fan_out") else (columns, rows)
    # no config: of a model of transformers, a weight without a bias is no Conv1D
    write_model(folder / "base", {"layer.weight": torch.randn(rows, columns)}, config=None)
    factors = {"layer.lora_A.weight": torch.randn(rank, wide), "layer.lora_B.weight": torch.randn(high, rank)}
    if config.get("use_dora"):
        factors["layer.lora_magnitude_vector"] = torch.randn(high)
    (folder / "lora").mkdir()
    save_file(factors, folder / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, **config}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))


# -- what is refused ---------------------------------------------------------------------------------

REFUSED: dict[str, dict[str, Any]] = {
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA, fast": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tmp_path: Path, kind: str) -> None:
    """Kinds whose factors alone do not say what the model is: named, not half applied."""
    settings = {"r": 2, "target_modules": PROJECTIONS, **REFUSED[kind]}
    make(tmp_path, LLAMA, settings)
    with pytest.raises(ModelError, match=str(tmp_path / "lora")):
        fold(tmp_path)


def test_a_head_saved_beside_its_factors(tmp_path: Path) -> None:
    """PEFT stores the base's head beside the factors of an adapted one, unless told not to."""
    expected = make(tmp_path, *KINDS["untied head"], save_embedding_layers="auto")
    for name, value in fold(tmp_path).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_half_of_a_tied_pair_is_refused(tmp_path: Path, module: str) -> None:
    settings = {"r": 2, "target_modules": PROJECTIONS, "modules_to_save": [module]}
    make(tmp_path, LLAMA, settings)
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match=rf"{module}\.weight' is saved whole, the base ties"):
        fold(tmp_path)


@pytest.mark.parametrize("key, part", [("use_dora", "magnitude_vector"), ("lora_bias", "B.bias")])
def test_a_vector_and_its_setting_go_together(tmp_path: Path, key: str, part: str) -> None:
    _write_adapter(tmp_path, 4, 4, 2)
    config, weights = tmp_path / "lora" / "adapter_config.json", tmp_path / "lora" / "adapter_model.safetensors"
    factors, plain = load_file(weights), json.loads(config.read_text())
    cases = [({key: True}, {}), ({}, {f"layer.lora_{part}": torch.ones(4)})]
    cases += [({key: True}, {f"layer.lora_{part}": torch.ones(5)})]
    for changed, vector in cases:
        config.write_text(json.dumps(plain | changed))
        save_file(factors | vector, weights)
        with pytest.raises(ModelError, match=rf"layer: ({key} is|{part[:4]}.* does not fit|bias \[5\] does not fit)"):
            open_model(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")


def test_factors_stored_twice(tmp_path: Path) -> None:
    _write_adapter(tmp_path, 4, 4, 2)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.layer.lora_A.weight": torch.ones(2, 4)}, file)
    with pytest.raises(ModelError, match="layer: a second A"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")


def test_a_changed_base_is_what_is_refused(tmp_path: Path) -> None:
    """PiSSA's factors on the plain base are not the model; converted by PEFT, they are."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(LLAMA).save_pretrained(tmp_path / "base")
    origin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings(action="ignore"):
        model = get_peft_model(origin, LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights="pissa"))
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = "pissa"
        train(model)
        model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        model.merge_and_unload().save_pretrained(tmp_path / "folded")
    expected = read_model(tmp_path / "folded")
    for name, value in fold(tmp_path).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_every_variant_that_peft_knows_is_folded_or_refused(tmp_path: Path) -> None:
    """A field of PEFT's config that turns LoRA into something else is one we know of."""
    _write_adapter(tmp_path, 4, 4, 2)
    file = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(file.read_text())
    variants = [field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")]
    assert "use_dora" in variants
    folds = {"monteclora_config"}  # plain B A outside training; use_dora and use_bdlora need more than the setting
    for name in [*variants, "layer_replication"]:
        file.write_text(json.dumps(config | {name: {"some": "setting"}}))
        if name in folds:
            open_model(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")
            continue
        with pytest.raises(ModelError, match=name):
            open_model(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")


@pytest.mark.parametrize("a, b", [((0, 4), (4, 0)), ((2, 4), (4, 3)), ((4,), (4, 2)), ((), ()), ((2, 4, 1), (4, 2))])
def test_factors_that_do_not_multiply(tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    _write_adapter(tmp_path, 4, 4, 2)
    factors = {"layer.lora_A.weight": torch.zeros(a), "layer.lora_B.weight": torch.zeros(b)}
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="do not multiply"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")


def test_a_tensor_adapted_twice(tmp_path: Path) -> None:
    _write_adapter(tmp_path, 4, 4, 2)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file(load_file(file) | {f"model.{name}": value for name, value in load_file(file).items()}, file)
    with pytest.raises(ModelError, match=r"'layer\.weight' is changed twice"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")


def test_integers_are_not_adapted(tmp_path: Path) -> None:
    """An adapter on a quantised base would be lost without a word."""
    _write_adapter(tmp_path, 4, 4, 2)
    write_model(tmp_path / "base", {"layer.weight": torch.zeros(4, 4, dtype=torch.int8), "x": torch.zeros(1)})
    with pytest.raises(ModelError, match="I8: only floats can be adapted"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_adaloras_e_is_a_number_for_each_direction(shape: tuple[int, ...]) -> None:
    """PEFT stores it as a column; with as many rows as directions, a column would scale the rows."""
    b, a, e = torch.randn(3, 3), torch.randn(3, 5), torch.randn(shape)
    expected = 0.5 * (b @ torch.diag(e.ravel())) @ a
    parts = Factors(b, a, e, 0.5)
    torch.testing.assert_close(low_rank(parts, slice(1, 3), None), expected[1:])
    left, right = factors(parts)
    torch.testing.assert_close(left @ right, expected)
