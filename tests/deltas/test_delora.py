"""DeLoRA: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import DeloraConfig
from safetensors.torch import load_file, save_file

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

CASES: list[Any] = [
    pytest.param({"target_modules": ["q_proj", "down_proj"], "delora_lambda": 9}, id="plain"),
    pytest.param(
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 5},
            "lambda_pattern": {"layers.1.self_attn.q_proj": 2},
        },
        id="patterns",
    ),
    pytest.param(
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "init_weights": False}, id="saved whole"
    ),
]


@pytest.mark.parametrize("settings", CASES)
def test_as_peft_merges(tmp_path: Path, settings: dict[str, Any]) -> None:
    deltas = peft_types.check(tmp_path, "llama", DeloraConfig(r=3, **settings))
    assert {delta.kind for (delta,) in deltas.values()} <= {"normalised", "dense"}
    peft_types.check_exact(deltas, "normalised", 5)


def test_a_tiny_factor_is_not_blown_up(tmp_path: Path) -> None:
    """A factor that was never trained is zero: its norm counts as the least."""
    peft_types.check(tmp_path, "llama", DeloraConfig(r=3, target_modules=["q_proj"]), noise=1e-6)


def test_without_the_norms(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", DeloraConfig(r=3, target_modules=["q_proj"]))
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "w_norm" not in name}, file)
    with pytest.raises(ModelError, match="q_proj: norms is missing"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
