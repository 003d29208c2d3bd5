"""VeRA and PVeRA: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PveraConfig, VeraConfig
from safetensors.torch import load_file, save_file

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not save")
TYPES: dict[str, Any] = {"vera": VeraConfig, "pvera": PveraConfig}
CASES: list[Any] = [
    pytest.param("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}, id="several shapes"),
    pytest.param("llama", {"target_modules": ["q_proj", "v_proj", "up_proj"], "save_projection": False}, id="drawn"),
    pytest.param(
        "llama",
        {
            "target_modules": ["down_proj"],
            "save_projection": False,
            "projection_prng_key": 7,
            "modules_to_save": ["norm"],
        },
        id="another seed",
    ),
    pytest.param("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}, id="Conv1D"),
    pytest.param(
        "gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "save_projection": False}, id="Conv1D, drawn"
    ),
]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("family", "settings"), CASES)
def test_as_peft_merges(tmp_path: Path, kind: str, family: str, settings: dict[str, Any]) -> None:
    deltas = peft_types.check(tmp_path, family, TYPES[kind](r=5, **settings))
    assert {delta.kind for (delta,) in deltas.values()} <= {"shared_factors", "dense"}
    peft_types.check_exact(deltas, "shared_factors", 5)
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert any("vera_A" in name for name in stored) == settings.get("save_projection", True)


def test_neither_matrices_nor_a_seed(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", VeraConfig(r=5, target_modules=["q_proj"]))
    file = tmp_path / "adapter/adapter_model.safetensors"
    stored = load_file(file)
    save_file({name: value for name, value in stored.items() if "lambda" in name}, file)
    with pytest.raises(ModelError, match="the shared matrices are not there"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    save_file({name: value for name, value in stored.items() if "vera_B" not in name}, file)
    with pytest.raises(ModelError, match="q_proj: B is missing"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
