"""Damaged adapters: one clear line, never a traceback and never a fold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergebench.deltas.open import open_model
from mergebench.deltas.peft import module
from mergebench.errors import ModelError, RunError
from tests.conftest import Cli
from tests.deltas import peft_types

TARGET = ["q_proj"]
SETTINGS: list[Any] = [
    (
        peft.LoraConfig(r=2, target_modules=TARGET),
        {"lora_alpha": float("nan")},
        "lora_alpha is nan, it must be a number",
    ),
    (peft.LoraConfig(r=2, target_modules=TARGET), {"r": "8"}, "it must be a whole number"),
    (peft.LoraConfig(r=2, target_modules=TARGET), {"use_rslora": "no"}, "use_rslora is 'no', it must be true or false"),
    (peft.LoraConfig(r=2, target_modules=TARGET), {"target_parameters": 1.5}, "it must be a list of names"),
    (peft.LoHaConfig(r=2, target_modules=TARGET), {"alpha": [8]}, r"alpha is \[8\], it must be a number"),
    (peft.VBLoRAConfig(r=2, vector_length=8, target_modules=TARGET), {"topk": True}, "topk is True"),
    (peft.PeanutConfig(r=2, target_modules=TARGET), {"act_fn": ["relu"]}, r"act_fn is \['relu'\], it must be a word"),
    (peft.PeanutConfig(r=2, target_modules=TARGET), {"depth": {}}, r"depth is \{\}, it must be a whole number"),
    (peft.PeanutConfig(r=2, target_modules=TARGET), {"scaling": "much"}, "scaling is 'much', it must be a number"),
    (peft.DeftConfig(r=2, target_modules=TARGET), {"alpha": "8"}, "alpha is '8', it must be a number"),
    (peft.TinyLoraConfig(target_modules=TARGET), {"weight_tying": 1.5}, "weight_tying is 1.5"),
]


@pytest.mark.parametrize(("config", "settings", "error"), SETTINGS)
def test_a_damaged_setting_is_named(tmp_path: Path, cli: Cli, config: Any, settings: Any, error: str) -> None:
    peft_types.make(tmp_path, "llama", config)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    reference = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"
    with pytest.raises(ModelError, match=error):
        open_model(reference)
    ran = cli("inspect", reference)
    assert ran.code == 3 and "Traceback" not in ran.err


BASES = peft.RandLoraConfig(r=3, target_modules=TARGET)
UNI = peft.UniLoraConfig(r=3, theta_d_length=30, save_indices=True, target_modules=TARGET)
CHOSEN = peft.VBLoRAConfig(r=3, vector_length=8, num_vectors=9, target_modules=TARGET, save_only_topk_weights=True)
TENSORS: list[Any] = [
    (BASES, "q_proj.randlora_A", lambda value: value[:1], r"its copy of A is \[1, 1, 16\]"),
    (peft.FrodConfig(progressbar=False, target_modules=TARGET), "frod_s_size", lambda value: value[:1], "size"),
    (UNI, "unilora_indices_A", lambda value: value + 1000, "an index beyond the vector of 30"),
    (UNI, "unilora_theta_d", lambda value: value[:0], "an index beyond the vector of 0"),
    (CHOSEN, "A_topk_indices", lambda value: value + 100, "the bank of 9 does not have"),
]


@pytest.mark.parametrize(("config", "name", "change", "error"), TENSORS)
def test_a_damaged_tensor_is_named(
    tmp_path: Path, config: Any, name: str, change: Callable[[Tensor], Tensor], error: str
) -> None:
    peft_types.make(tmp_path, "llama", config)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: change(value).clone() if name in key else value for key, value in load_file(file).items()}, file)
    with pytest.raises((ModelError, RunError), match=error):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}").state_dict()


def test_a_base_weight_of_another_shape(tmp_path: Path) -> None:
    """That a LoRA holds beside its factors: it would be read beyond its end."""
    peft_types.make(tmp_path, "llama", peft.LoraConfig(r=2, target_modules=TARGET))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    for shape in ((16,), (4, 16)):
        save_file(load_file(file) | {name: torch.zeros(shape)}, file)
        with pytest.raises(ModelError, match=r"q_proj\.base_layer\.weight: values"):
            open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")


def test_a_pattern_that_takes_exponential_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own `re` would take 2^60 steps: it is given up, and ordinary patterns are not."""
    monkeypatch.setattr(module, "LONGEST", 0.1)
    name, ordinary = "a" * 60 + ".q_proj", {r"layers\.\d+\.(q|v)_proj": 8}
    with pytest.raises(ModelError, match="takes too long to match"):
        module.patterned(tmp_path, "a" * 60, {"alpha_pattern": {"(?:a|aa)+(?<=b)c": 1}}, "alpha_pattern", 2)
    assert module.patterned(tmp_path, name, {"alpha_pattern": ordinary}, "alpha_pattern", 2) == 2
    named = "model.layers.11.q_proj"
    assert module.patterned(tmp_path, named, {"alpha_pattern": ordinary}, "alpha_pattern", 2) == 8
