"""GraLoRA: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import GraloraConfig

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

CASES: list[Any] = [
    pytest.param("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4}, id="two blocks"),
    pytest.param(
        "llama", {"target_modules": ["k_proj", "up_proj"], "r": 8, "gralora_k": 4, "alpha": 9}, id="four blocks"
    ),
    pytest.param("llama", {"target_modules": ["v_proj", "down_proj"], "r": 4, "hybrid_r": 3}, id="hybrid"),
    pytest.param(
        "gpt2",
        {"target_modules": ["c_attn", "mlp.c_proj"], "r": 4, "hybrid_r": 2, "fan_in_fan_out": True},
        id="Conv1D, hybrid",
    ),
]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_as_peft_merges(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    deltas = peft_types.check(tmp_path, family, GraloraConfig(init_weights=False, **settings))
    assert {delta.kind for (delta,) in deltas.values()} == {"blocks"}
    peft_types.check_exact(deltas, "blocks", settings["r"] * settings.get("gralora_k", 2) + settings.get("hybrid_r", 0))


def test_without_alpha(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", GraloraConfig(r=4, target_modules=["q_proj"]))
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha": None}))
    with pytest.raises(ModelError, match="no scale: alpha None, rank 4"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
