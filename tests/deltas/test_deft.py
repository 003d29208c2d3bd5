"""DEFT and PaRa: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import DeftConfig

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

LAYERS = ["q_proj", "down_proj", "up_proj"]
CONV = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qr": ("llama", {"r": 3, "target_modules": LAYERS, "decomposition_method": "qr"}),
    "relu": ("llama", {"r": 3, "target_modules": LAYERS, "decomposition_method": "relu"}),
    "scaled": ("llama", {"r": 3, "target_modules": LAYERS, "alpha": 2, "init_weights": False}),
    "PaRa": ("llama", {"r": 3, "target_modules": LAYERS, "para": True}),
    "a rank too large, saved whole": (
        "llama",
        {"r": 20, "target_modules": ["v_proj"], "alpha": 3, "modules_to_save": ["lm_head"]},
    ),
    "Conv1D, qr": ("gpt2", {"r": 3, "alpha": 4, "decomposition_method": "qr", **CONV}),
    "Conv1D, relu": ("gpt2", {"r": 3, "decomposition_method": "relu", **CONV}),
    "Conv1D, PaRa": ("gpt2", {"r": 3, "para": True, **CONV}),
}


@pytest.mark.parametrize("case", CASES)
def test_as_peft_merges(tmp_path: Path, case: str) -> None:
    family, settings = CASES[case]
    deltas = peft_types.check(tmp_path, family, DeftConfig(**settings))
    assert {delta.kind for (delta,) in deltas.values()} <= {"replaced_subspace", "dense"}


def test_what_does_not_fit(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", DeftConfig(r=3, target_modules=["down_proj"]))
    config = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text())
    for changed, message in (
        ({"para": True}, "para, but deft_R is there"),
        ({"decomposition_method": "svd"}, "'svd' is none of qr and relu"),
    ):
        config.write_text(json.dumps(settings | changed))
        with pytest.raises(ModelError, match=message):
            open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
