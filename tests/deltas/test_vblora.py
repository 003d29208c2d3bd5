"""VB-LoRA: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import VBLoRAConfig
from safetensors.torch import load_file, save_file

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

CASES: list[Any] = [
    pytest.param("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}, id="logits"),
    pytest.param(
        "llama", {"target_modules": ["k_proj", "up_proj"], "topk": 3, "save_only_topk_weights": True}, id="chosen"
    ),
    pytest.param(
        "llama",
        {"target_modules": ["k_proj"], "num_vectors": 300, "save_only_topk_weights": True, "modules_to_save": ["norm"]},
        id="16-bit indices",
    ),
    pytest.param("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}, id="Conv1D"),
    pytest.param(
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "save_only_topk_weights": True},
        id="Conv1D, chosen",
    ),
]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_as_peft_merges(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    config = VBLoRAConfig(r=3, vector_length=8, **{"num_vectors": 12, **settings})
    deltas = peft_types.check(tmp_path, family, config)
    assert {delta.kind for (delta,) in deltas.values()} <= {"vector_bank", "dense"}
    peft_types.check_exact(deltas, "vector_bank", 3)


def test_half_of_what_was_chosen(tmp_path: Path) -> None:
    config = VBLoRAConfig(r=3, vector_length=8, num_vectors=12, target_modules=["q_proj"], save_only_topk_weights=True)
    peft_types.make(tmp_path, "llama", config)
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "B_topk_weights" not in name}, file)
    with pytest.raises(ModelError, match="weights_b is missing"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
