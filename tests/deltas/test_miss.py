"""MiSS in its three forms: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import MissConfig

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

LAYERS = ["q_proj", "down_proj", "up_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": LAYERS},
    "a narrower last block": {"r": 5, "target_modules": LAYERS, "init_weights": False},
    "mini": {"r": 4, "target_modules": LAYERS, "init_weights": "mini", "mini_r": 2},
    "bat, saved whole": {"r": 4, "target_modules": LAYERS, "init_weights": "bat", "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", CASES)
def test_as_peft_merges(tmp_path: Path, case: str) -> None:
    deltas = peft_types.check(tmp_path, "llama", MissConfig(**CASES[case]))
    assert {delta.kind for (delta,) in deltas.values()} <= {"repeated", "blockwise", "dense"}


def test_what_does_not_fit(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", MissConfig(r=4, target_modules=["q_proj"]))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_weights": "mini", "mini_r": 2}))
    with pytest.raises(ModelError, match=r"block is F32 \[4, 16\], \[any, 2\] was expected"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
