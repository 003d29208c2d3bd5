"""AdaLoRA: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig
from safetensors.torch import load_file

from mergebench.adapters import describe_adapter
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.conftest import Cli
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


def test_what_is_told_of_an_allocation(tmp_path: Path) -> None:
    """PEFT's own allocator takes the triplets; the orthogonality is PEFT's regulariser."""
    peft_types.make(tmp_path, "llama", config(target_modules=["q_proj", "k_proj"], rank_pattern=PATTERN))
    found = describe_adapter(tmp_path / "adapter")
    assert found.variants == ["7 of 16 triplets left"] and found.ranks == [0, 1, 2, 4]
    assert found.rank_map["model.layers.0.self_attn.q_proj"] == 2
    model = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    norms = [
        float(torch.linalg.norm((side @ side.T - torch.eye(len(side))).double()))
        for name, value in model.items()
        if not name.endswith("lora_E")
        for side in [value if name.endswith("lora_A") else value.T]
    ]
    assert found.orthogonality == pytest.approx(sum(norms) / len(norms), rel=1e-5)


def test_one_that_was_never_allocated_is_a_lora_of_its_first_rank(tmp_path: Path, cli: Cli) -> None:
    peft_types.make(tmp_path, "llama", config(target_modules=["q_proj"]))
    code, out, _ = cli("adapters", "inspect", tmp_path / "adapter", "--plot", tmp_path / "ranks.png")
    assert code == 0 and "ADALORA, never allocated: a LoRA of rank 4" in out and "|A A' - I|" in out
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    refused = cli("adapters", "inspect", tmp_path / "adapter", tmp_path / "adapter", "--plot", tmp_path / "r.png")
    assert refused.code == 2 and "--plot: of one LoRA or AdaLoRA" in refused.err
