"""Adapters on layers of both orientations, and on half of a tied pair: the base tells, not the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import read_model

from mergebench.deltas.open import open_model
from tests.deltas import peft_types
from tests.deltas.test_lora import GPT2, LLAMA

TYPES: dict[str, Any] = {
    "lora": (peft.LoraConfig, {"r": 4}),
    "dora": (peft.LoraConfig, {"r": 4, "use_dora": True}),
    "hira": (peft.HiraConfig, {"r": 4}),
    "ia3": (peft.IA3Config, {"feedforward_modules": ["c_proj"]}),
    "adalora": (peft.AdaLoraConfig, {"init_r": 4, "total_step": 9}),
    "gralora": (peft.GraloraConfig, {"r": 4, "hybrid_r": 2}),
    "vera": (peft.VeraConfig, {"r": 3}),
    "pvera": (peft.PveraConfig, {"r": 3}),
    "tinylora": (peft.TinyLoraConfig, {"u": 4}),
    "vblora": (peft.VBLoRAConfig, {"r": 3, "vector_length": 8, "num_vectors": 9}),
    "unilora": (peft.UniLoraConfig, {"r": 3, "theta_d_length": 30, "save_indices": True}),
    "randlora": (peft.RandLoraConfig, {"r": 3}),
    "deft": (peft.DeftConfig, {"r": 3}),
    "frod": (peft.FrodConfig, {"progressbar": False}),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 20}),
    "waveft": (peft.WaveFTConfig, {"n_frequency": 20}),
}


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 with a head of its own, a Linear beside Conv1D, and a Llama with tied embeddings."""
    apart = transformers.GPT2Config(**GPT2.to_dict() | {"tie_word_embeddings": False})
    tied = transformers.LlamaConfig(**LLAMA.to_dict() | {"tie_word_embeddings": True})
    monkeypatch.setattr(peft_types, "FAMILIES", {**peft_types.FAMILIES, "gpt2, head apart": apart, "tied": tied})


def say(folder: Path, **settings: Any) -> str:
    """Change the adapter's config; return the reference."""
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return f"{folder / 'base'}+{folder / 'adapter'}"


@pytest.mark.parametrize("kind", TYPES)
def test_conv1d_and_linear_in_one_adapter(tmp_path: Path, kind: str) -> None:
    """attn.c_proj is square: no shape tells how it lies, and the config holds what was the last layer's."""
    config, settings = TYPES[kind]
    config = config(target_modules=["c_attn", "c_proj", "lm_head"], **settings)
    peft_types.check(tmp_path, "gpt2, head apart", config)
    for said in (True, False):
        expected, found = read_model(tmp_path / "out"), open_model(say(tmp_path, fan_in_fan_out=said)).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["llama", "biased"])
def test_linear_layers_that_the_config_says_are_not(tmp_path: Path, family: str) -> None:
    expected = peft_types.make(tmp_path, family, peft.HiraConfig(r=4, target_modules=["o_proj"], fan_in_fan_out=True))
    for name, value in open_model(say(tmp_path)).state_dict().items():
        torch.testing.assert_close(value, expected[name])


HALVES: list[Any] = [
    ("embed_tokens", peft.OFTConfig(oft_block_size=4, target_modules=["embed_tokens", "q_proj"])),
    ("embed_tokens", peft.TinyLoraConfig(u=4, target_modules=["embed_tokens", "q_proj"])),
    ("lm_head", peft.HRAConfig(r=4, target_modules=["lm_head"])),
    ("lm_head", peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])),
]


@pytest.mark.parametrize(("half", "config"), HALVES)
def test_half_of_a_tied_pair_is_untied(tmp_path: Path, half: str, config: Any) -> None:
    """The other half stays the base's, as in training; PEFT's merge changes both."""
    expected = peft_types.make(tmp_path, "tied", config)["model.embed_tokens.weight"]
    before, model = read_model(tmp_path / "base")["model.embed_tokens.weight"], open_model(say(tmp_path))
    found = model.state_dict()
    halves = found.pop("model.embed_tokens.weight"), found.pop("lm_head.weight")
    changed, other = halves if half == "embed_tokens" else halves[::-1]
    torch.testing.assert_close(changed, expected)
    assert torch.equal(other, before) and model.config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    "config",
    [
        peft.GloraConfig(r=3, target_modules=["q_proj"], bias="glora_only"),
        peft.LoraConfig(r=3, target_modules=["q_proj"], bias="all", lora_bias=True),
    ],
)
def test_a_bias_that_is_trained_and_added_to(tmp_path: Path, config: Any) -> None:
    peft_types.check(tmp_path, "biased", config)
