"""IA3: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config

from tests.deltas import peft_types

CASES: list[Any] = [
    pytest.param(
        "llama", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, id="llama"
    ),
    pytest.param(
        "gpt2",
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
        id="Conv1D and biases",
    ),
    pytest.param(
        "llama",
        {"target_modules": ["q_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]},
        id="saved whole",
    ),
]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_as_peft_merges(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    deltas = peft_types.check(tmp_path, family, IA3Config(**settings))
    assert {delta.kind for (delta,) in deltas.values()} <= {"scaled", "dense"}
