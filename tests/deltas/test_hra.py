"""HRA: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import HRAConfig

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

CASES: dict[str, dict[str, Any]] = {
    "even": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "odd": {"r": 5, "target_modules": ["v_proj"], "init_weights": False},
    "one": {"r": 1, "target_modules": ["v_proj"]},
    "orthogonal, saved whole": {
        "r": 4, "target_modules": ["q_proj", "down_proj"], "apply_GS": True, "modules_to_save": ["lm_head"],
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_as_peft_merges(tmp_path: Path, case: str) -> None:
    deltas = peft_types.check(tmp_path, "llama", HRAConfig(**CASES[case]))
    assert {delta.kind for (delta,) in deltas.values()} <= {"reflected", "dense"}


def test_what_does_not_fit(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", HRAConfig(r=18, target_modules=["q_proj"]))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"apply_GS": True}))
    with pytest.raises(ModelError, match="18 planes of 16 columns cannot be orthogonal"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
