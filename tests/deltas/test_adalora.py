"""AdaLoRA: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import AdaLoraConfig

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

PATTERN = {
    f"model.layers.{layer}.self_attn.{name}.lora_E": kept
    for layer, name, kept in (
        (0, "q_proj", [True, False, True, False]),
        (0, "k_proj", [False] * 4),
        (1, "q_proj", [True] * 4),
        (1, "k_proj", [False, False, False, True]),
    )
}
CASES: list[Any] = [
    pytest.param("llama", {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 7}, id="never allocated"),
    pytest.param("llama", {"target_modules": ["q_proj", "k_proj"], "rank_pattern": PATTERN}, id="ranks from 0 to 4"),
    pytest.param("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}, id="Conv1D"),
    pytest.param("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}, id="biases"),
    pytest.param("resnet", {"target_modules": ["convolution"]}, id="convolutions"),
    pytest.param("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, id="saved whole"),
]


def config(**settings: Any) -> AdaLoraConfig:
    return AdaLoraConfig(init_r=4, target_r=2, total_step=9, **settings)


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_as_peft_merges(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    deltas = peft_types.check(tmp_path, family, config(**settings))
    assert {delta.kind for (delta,) in deltas.values()} <= {"low_rank", "dense"}
    if family != "resnet":
        peft_types.check_exact(deltas, "low_rank", 4)


def test_a_module_of_rank_zero_is_left_alone(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", config(target_modules=["q_proj", "k_proj"], rank_pattern=PATTERN))
    deltas = open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}").deltas
    assert sorted(deltas) == [
        f"model.layers.{at}.self_attn.{name}_proj.weight" for at, name in ((0, "q"), (1, "k"), (1, "q"))
    ]
    ranks = {name: one.describe() for name, (one,) in deltas.items()}
    assert ranks["model.layers.1.self_attn.k_proj.weight"] == "low_rank rank 1"


def test_without_the_initial_rank_there_is_no_scale(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", config(target_modules=["q_proj"]))
    file = tmp_path / "adapter/adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in settings.items() if key != "init_r"}))
    with pytest.raises(ModelError, match="init_r and lora_alpha must be numbers"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
