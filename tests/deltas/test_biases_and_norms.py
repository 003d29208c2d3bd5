"""BEFT and LN tuning: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_model
from peft import BeftConfig, LNTuningConfig
from safetensors.torch import load_file, save_file

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types
from tests.deltas.test_lora import LLAMA

BIASED = copy.deepcopy(LLAMA)
BIASED.attention_bias = BIASED.mlp_bias = True

# PEFT puts BEFT on no Conv1D.
CASES: list[Any] = [
    pytest.param("biased", BeftConfig(target_modules=["k_proj", "down_proj"]), id="BEFT"),
    pytest.param("biased", BeftConfig(target_modules=["v_proj"], modules_to_save=["lm_head"]), id="BEFT, whole"),
    pytest.param("llama", LNTuningConfig(target_modules=["input_layernorm", "norm"]), id="RMSNorm"),
    pytest.param("gpt2", LNTuningConfig(target_modules=["ln_1", "ln_f"]), id="LayerNorm and its bias"),
    pytest.param("gpt2", LNTuningConfig(target_modules=["ln_1", "c_fc"]), id="Conv1D"),
    pytest.param("llama", LNTuningConfig(target_modules=["q_proj"]), id="Linear"),
]


@pytest.fixture(autouse=True)
def _biased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peft_types.FAMILIES, "biased", BIASED)


@pytest.mark.parametrize(("family", "config"), CASES)
def test_as_peft_merges(tmp_path: Path, family: str, config: Any) -> None:
    deltas = peft_types.check(tmp_path, family, config)
    assert {delta.kind for (delta,) in deltas.values()} == {"dense"}


def test_trained_norms_are_read_as_they_are_stored(tmp_path: Path) -> None:
    expected = peft_types.make(tmp_path, "gpt2", LNTuningConfig(target_modules=["ln_1"]))
    state = open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}").state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in read_model(tmp_path / "base"))


def test_norms_and_a_module_saved_whole(tmp_path: Path) -> None:
    """PEFT's merge of LN tuning leaves its wrapper around the head; what is in the wrapper is the oracle."""
    config = LNTuningConfig(target_modules=["norm"], modules_to_save=["lm_head"])
    expected = peft_types.make(tmp_path, "llama", config)
    state = open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}").state_dict()
    assert torch.equal(state["lm_head.weight"], expected["lm_head.modules_to_save.default.weight"])
    assert torch.equal(state["model.norm.weight"], expected["model.norm.weight"])


REFUSED: list[Any] = [
    pytest.param("gpt2", LNTuningConfig(target_modules=["ln_1"]), "ln_tuning_layers.bias", None, "the bias is missing"),
    pytest.param("gpt2", LNTuningConfig(target_modules=["ln_1"]), "layers.weight", None, "weight is missing"),
    pytest.param(
        "llama", LNTuningConfig(target_modules=["norm"]), "layers.weight", 5, r"F32 \[5\], \[16\] was expected"
    ),
    pytest.param(
        "biased", BeftConfig(target_modules=["q_proj"]), "beft_bias", 5, r"F32 \[1, 5\], \[1, 16\] was expected"
    ),
]


@pytest.mark.parametrize(("family", "config", "name", "size", "error"), REFUSED)
def test_refused(tmp_path: Path, family: str, config: Any, name: str, size: int | None, error: str) -> None:
    peft_types.make(tmp_path, family, config)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if name in key)
    value = tensors.pop(key)
    save_file(tensors if size is None else tensors | {key: value[..., :size].contiguous()}, file)
    with pytest.raises(ModelError, match=error):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")


def test_no_bias_to_change(tmp_path: Path) -> None:
    """PEFT trains such an adapter, and cannot merge it either."""
    peft_types.make(tmp_path, "biased", BeftConfig(target_modules=["q_proj"]))
    file = tmp_path / "base" / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "q_proj.bias" not in name}, file)
    with pytest.raises(ModelError, match="q_proj: it changes the bias, and the base has none"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
