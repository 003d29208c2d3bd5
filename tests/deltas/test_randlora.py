"""RandLoRA: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import RandLoraConfig

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not save")
CASES: list[Any] = [
    pytest.param("llama", {"target_modules": ["q_proj", "v_proj", "down_proj", "up_proj"]}, id="wide, tall and square"),
    pytest.param("llama", {"target_modules": ["q_proj", "v_proj"], "sparse": True, "randlora_alpha": 7}, id="sparse"),
    pytest.param(
        "llama", {"target_modules": ["o_proj"], "very_sparse": True, "modules_to_save": ["norm"]}, id="saved whole"
    ),
    pytest.param("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, id="Conv1D"),
]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_as_peft_merges(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    deltas = peft_types.check(tmp_path, family, RandLoraConfig(r=3, **settings))
    assert {delta.kind for (delta,) in deltas.values()} <= {"random_bases", "dense"}


def test_bases_that_no_file_holds(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", RandLoraConfig(r=3, target_modules=["q_proj"], save_projection=False))
    with pytest.raises(ModelError, match="save_projection is false"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
