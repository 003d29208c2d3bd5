"""TinyLoRA: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import TinyLoraConfig
from safetensors.torch import load_file, save_file

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
CASES: list[Any] = [
    pytest.param("llama", LINEAR, id="a vector each"),
    pytest.param("llama", {**LINEAR, "weight_tying": 1.0}, id="one vector"),
    pytest.param("llama", {**LINEAR, "weight_tying": 0.6, "projection_seed": 9, "r": 3}, id="two share a vector"),
    pytest.param("llama", {"target_modules": ["embed_tokens", "o_proj"]}, id="embedding"),
    pytest.param("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}, id="Conv1D"),
]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_as_peft_merges(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    deltas = peft_types.check(tmp_path, family, TinyLoraConfig(u=8, **settings))
    assert {delta.kind for (delta,) in deltas.values()} == {"projected_core"}
    peft_types.check_exact(deltas, "projected_core", settings.get("r", 2))


def test_whose_vector_cannot_be_told(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", TinyLoraConfig(u=8, **LINEAR))
    file = tmp_path / "adapter/adapter_model.safetensors"
    stored = load_file(file)
    save_file({name: value + ("tinylora_P" in name) for name, value in stored.items()}, file)
    with pytest.raises(ModelError, match="P is not drawn from projection_seed 42"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    save_file({name: value for name, value in stored.items() if "tinylora_P" not in name}, file)
    with pytest.raises(ModelError, match="no P is saved"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
