"""GLoRA with every form of its paths: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import GloraConfig
from safetensors.torch import load_file, save_file

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

LAYERS = ["q_proj", "down_proj", "up_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "low rank": ("llama", {}),
    "vectors, saved whole": ("llama", {"config_A_B": "vector", "modules_to_save": ["lm_head"]}),
    "numbers": ("llama", {"config_A_B": "constant"}),
    "biases": ("biased", {}),
    "biases by vectors": ("biased", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    "biases without W C": ("biased", {"config_A_B": "constant", "config_C": "none"}),
    "biases alone": ("biased", {"config_A_B": "none"}),
    "weights alone": ("biased", {"config_C": "none", "config_D_E": "none"}),
}


@pytest.mark.parametrize("case", CASES)
def test_as_peft_merges(tmp_path: Path, case: str) -> None:
    family, settings = CASES[case]
    deltas = peft_types.check(tmp_path, family, GloraConfig(r=3, target_modules=LAYERS, **settings))
    assert {delta.kind for (delta,) in deltas.values()} <= {"affine", "affine_bias", "dense"}


def test_what_is_refused(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "biased", GloraConfig(r=3, target_modules=["q_proj"]))
    reference, file = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", tmp_path / "adapter" / "adapter_model.safetensors"
    with pytest.raises(ModelError, match="its bias depends on the weight, which another delta changes before"):
        open_model(f"{reference}+{tmp_path / 'adapter'}")
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if not name.endswith("glora_A.Xu")}, file)
    with pytest.raises(ModelError, match="glora_A is Xd"):
        open_model(reference)
    save_file({name: value for name, value in tensors.items() if "glora_E" not in name}, file)
    with pytest.raises(ModelError, match="glora_E is missing"):
        open_model(reference)
