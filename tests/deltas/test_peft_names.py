"""Names of an adapter's tensors as other versions of PEFT write them: with the adapter's own name, `default`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

TYPES: dict[str, Any] = {
    "adalora": peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=["q_proj"]),
    "delora": peft.DeloraConfig(r=3, target_modules=["q_proj"]),
    "gralora": peft.GraloraConfig(r=4, hybrid_r=2, target_modules=["q_proj"]),
    "vera": peft.VeraConfig(r=3, target_modules=["q_proj"]),
    "pvera": peft.PveraConfig(r=3, target_modules=["q_proj"]),
    "tinylora": peft.TinyLoraConfig(u=4, target_modules=["q_proj"]),
    "vblora": peft.VBLoRAConfig(r=3, vector_length=8, num_vectors=9, target_modules=["q_proj"]),
    "vblora, chosen": peft.VBLoRAConfig(
        r=3, vector_length=8, num_vectors=9, target_modules=["q_proj"], save_only_topk_weights=True
    ),
    "unilora": peft.UniLoraConfig(r=3, theta_d_length=30, save_indices=True, target_modules=["q_proj"]),
    "loha": peft.LoHaConfig(r=3, target_modules=["q_proj"]),
    "lokr": peft.LoKrConfig(r=3, target_modules=["q_proj"]),
    "randlora": peft.RandLoraConfig(r=3, target_modules=["q_proj"]),
}


def named(name: str) -> str:
    """With the adapter's name where PEFT has it in memory."""
    return re.sub(r"(\.weight|\.\d+|_topk_\w+)?$", r".default\1", name, count=1)


@pytest.mark.parametrize("kind", TYPES)
def test_with_the_adapters_name(tmp_path: Path, kind: str) -> None:
    peft_types.make(tmp_path, "llama", TYPES[kind])
    reference = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"
    expected = open_model(reference).state_dict()
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({named(name): value for name, value in load_file(file).items()}, file)
    for name, value in open_model(reference).state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", TYPES)
def test_a_strange_tensor_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    peft_types.make(tmp_path, "llama", TYPES[kind])
    file = tmp_path / "adapter/adapter_model.safetensors"
    strange = "base_model.model.model.layers.0.self_attn.q_proj.strange"
    save_file(load_file(file) | {strange: torch.zeros(3)}, file)
    with pytest.raises(ModelError, match=r"q_proj\.strange"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
