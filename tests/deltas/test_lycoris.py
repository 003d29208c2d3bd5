"""LoHa and LoKr: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoHaConfig, LoKrConfig
from safetensors.torch import load_file, save_file

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

TYPES: dict[str, Any] = {"hadamard": LoHaConfig, "kronecker": LoKrConfig}
PATTERNS = {
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "alpha": 5,
    "rank_pattern": {"v_proj": 2},
    "alpha_pattern": {"layers.1.self_attn.q_proj": 9},
}
BOTH: list[Any] = [
    pytest.param("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}, id="linear"),
    pytest.param("llama", PATTERNS, id="patterns"),
    pytest.param("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, id="saved whole"),
    pytest.param("resnet", {"target_modules": ["convolution"]}, id="convolutions"),
    pytest.param("resnet", {"target_modules": ["convolution"], "use_effective_conv2d": True}, id="Tucker"),
]
LOKR: list[Any] = [
    pytest.param("llama", {"decompose_both": True, "r": 1}, id="both as factors"),
    pytest.param("llama", {"r": 64}, id="both whole"),
    pytest.param("llama", {"decompose_factor": 4}, id="a given factor"),
    pytest.param("resnet", {"r": 64}, id="a whole kernel"),
    pytest.param(
        "resnet", {"r": 1, "decompose_both": True, "use_effective_conv2d": True}, id="Tucker, both as factors"
    ),
]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("family", "settings"), BOTH)
def test_as_peft_merges(tmp_path: Path, kind: str, family: str, settings: dict[str, Any]) -> None:
    deltas = peft_types.check(tmp_path, family, TYPES[kind](**{"r": 3, **settings}))
    assert {delta.kind for (delta,) in deltas.values()} <= {kind, "dense"}


@pytest.mark.parametrize(("family", "settings"), LOKR)
def test_the_forms_of_lokr(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    target = "convolution" if family == "resnet" else "up_proj"
    deltas = peft_types.check(tmp_path, family, LoKrConfig(**{"r": 2, "target_modules": [target], **settings}))
    assert {delta.kind for (delta,) in deltas.values()} == {"kronecker"}


@pytest.mark.parametrize(
    ("kind", "lost", "error"),
    [
        ("hadamard", "hada_w2_b", "q_proj: w2_b is missing"),
        ("kronecker", "lokr_w1", "q_proj: each of C and D is needed"),
    ],
)
def test_a_part_is_missing(tmp_path: Path, kind: str, lost: str, error: str) -> None:
    peft_types.make(tmp_path, "llama", TYPES[kind](r=2, target_modules=["q_proj"]))
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if lost not in name}, file)
    with pytest.raises(ModelError, match=error):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")


def in_one_dimension(folder: Path, config: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(OrderedDict(conv=torch.nn.Conv1d(6, 8, 3), out=torch.nn.Linear(8, 4)))
    save_file(plain.state_dict(), folder / "base.safetensors")
    model = peft.get_peft_model(plain, config(target_modules=["conv", "out"], init_weights=False, **settings))
    model.save_pretrained(folder / "adapter")
    return model


# PEFT cannot multiply out a LoKr in Tucker form in one dimension
@pytest.mark.parametrize(("kind", "tucker"), [("hadamard", False), ("hadamard", True), ("kronecker", False)])
def test_a_convolution_in_one_dimension(tmp_path: Path, kind: str, tucker: bool) -> None:
    model = in_one_dimension(tmp_path, TYPES[kind], r=1, use_effective_conv2d=tucker)
    expected = model.merge_and_unload().state_dict()
    found = open_model(f"{tmp_path / 'base.safetensors'}+{tmp_path / 'adapter'}").state_dict()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=peft_types.CLOSE)


def test_a_whole_kernel_in_one_dimension(tmp_path: Path) -> None:
    in_one_dimension(tmp_path, LoKrConfig, r=2)
    with pytest.raises(ModelError, match="conv: w2 of a convolution in one dimension is whole"):
        open_model(f"{tmp_path / 'base.safetensors'}+{tmp_path / 'adapter'}")
