"""Uni-LoRA: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, UniLoraConfig

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

CASES: list[Any] = [
    pytest.param("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}, id="linear"),
    pytest.param(
        "llama", {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"], "proj_seed": 3}, id="saved whole"
    ),
    pytest.param("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}, id="Conv1D"),
]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_as_peft_merges(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    config = UniLoraConfig(r=3, theta_d_length=40, save_indices=True, **settings)
    deltas = peft_types.check(tmp_path, family, config)
    assert {delta.kind for (delta,) in deltas.values()} <= {"shared_vector", "dense"}
    peft_types.check_exact(deltas, "shared_vector", 3)


def test_indices_that_no_file_tells(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", UniLoraConfig(r=3, theta_d_length=40, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="save_indices is false") as caught:
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    assert caught.value.hint and "save_indices" in caught.value.hint


def test_indices_saved_later(tmp_path: Path) -> None:
    """What the error advises works."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    expected = peft_types.make(tmp_path, "llama", UniLoraConfig(r=3, theta_d_length=40, target_modules=["q_proj"]))
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"save_indices": True}))
    with warnings.catch_warnings(action="ignore"):
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        PeftModel.from_pretrained(model, adapter).save_pretrained(adapter)
    for name, value in open_model(f"{base}+{adapter}").state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
