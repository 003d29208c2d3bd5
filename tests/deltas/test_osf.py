"""OSF: the formula in float64 is the oracle, and PEFT's `merge_and_unload` as far as its float32 decomposition goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_model
from peft import OSFConfig
from safetensors.torch import load_file, save_file

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

LAYERS = ["q_proj", "v_proj", "down_proj", "up_proj"]
CASES: dict[str, dict[str, Any]] = {
    "half": {"target_modules": LAYERS},
    "ranks": {"target_modules": LAYERS, "effective_rank": 0.7, "rank_pattern": {"q_proj": 3}},
    "random": {"target_modules": LAYERS, "effective_rank": 6, "init_weights": False},
}


@pytest.mark.parametrize("case", CASES)
def test_as_peft_merges(tmp_path: Path, case: str) -> None:
    deltas = peft_types.check(tmp_path, "llama", OSFConfig(**CASES[case]), close=2e-5)
    assert {delta.kind for (delta,) in deltas.values()} == {"truncated"}
    base, out = read_model(tmp_path / "base"), read_model(tmp_path / "out")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in deltas:
        where = f"base_model.model.{name.removesuffix('.weight')}.osf_svd_params"
        u, s, v = (stored[f"{where}.{part}_low"].double() for part in "USV")
        left, values, right = torch.linalg.svd(base[name].double(), full_matrices=False)
        k = len(values) - len(s)
        expected = left[:, :k] * values[:k] @ right[:k] + u * s @ v
        assert float((out[name] - expected).abs().max()) <= peft_types.CLOSE * float(expected.abs().max())


def test_what_is_refused(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", OSFConfig(target_modules=["q_proj"]))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: value[:5] if name.endswith("S_low") else value for name, value in tensors.items()}, file)
    with pytest.raises(ModelError, match=r"S is F32 \[5\], \[8\] was expected"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")


def test_the_memory_it_takes_is_told(tmp_path: Path) -> None:
    """W in float64 is not in the file."""
    peft_types.make(tmp_path, "llama", OSFConfig(target_modules=["up_proj"]))
    ((delta,), *_) = open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}").deltas.values()
    assert delta.resident() >= sum(info.nbytes for info in delta.stored) + 8 * 24 * 16
