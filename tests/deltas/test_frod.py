"""FRoD: PEFT's `merge_and_unload` is the oracle, on the base that its basis was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_model
from peft import FrodConfig
from safetensors.torch import load_file, save_file

from mergebench.deltas.formats.frod import _category
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

CONV = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj", "up_proj"]}),
    "denser": ("llama", {"target_modules": ["v_proj"], "sparse_rate": 0.2, "init_weights": False}),
    "no S, saved whole": ("llama", {"target_modules": ["q_proj"], "sparse_rate": 0.0, "modules_to_save": ["lm_head"]}),
    "Conv1D": ("gpt2", {"sparse_rate": 0.1, **CONV}),
}


@pytest.mark.parametrize("case", CASES)
def test_as_peft_merges(tmp_path: Path, case: str) -> None:
    family, settings = CASES[case]
    deltas = peft_types.check(tmp_path, family, FrodConfig(progressbar=False, **settings))
    assert {delta.kind for (delta,) in deltas.values()} <= {"rebased", "dense"}


def test_the_saved_basis_counts(tmp_path: Path) -> None:
    """PEFT computes U with a basis made again from this base; ours is the formula with the basis of the file."""
    peft_types.make(tmp_path, "llama", FrodConfig(target_modules=["q_proj"], progressbar=False, sparse_rate=0.1))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = load_file(file)
    basis = stored["base_model.frod_V.self_attn_q_proj"]
    basis += 0.1 * torch.randn(basis.shape, generator=torch.Generator().manual_seed(0))
    save_file(stored, file)
    base = read_model(tmp_path / "base")
    made = open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}").state_dict()
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        u = base[f"{name}.weight"].double() @ torch.linalg.inv(basis.double()).T
        u /= u.norm(dim=0)
        middle = torch.diag(stored[f"base_model.model.{name}.frod_lambda_l"].double())
        rows, columns = stored["base_model.frod_s_indices.self_attn_q_proj"]
        middle[rows, columns] += stored[f"base_model.model.{name}.frod_lambda_s_values"].double()
        expected = u @ middle @ basis.double().T
        worst = float((made[f"{name}.weight"] - expected).abs().max())
        assert worst <= peft_types.CLOSE * float(expected.abs().max())


def test_names_of_bases() -> None:
    for module, name in (
        ("encoder.layer.0.attention.output.dense", "attention_output"),
        ("encoder.layer.0.output.dense", "output_dense"),
        ("model.layers.3.mlp.up_proj", "mlp_up_proj"),
        ("layers.0.linear", "linear"),
        ("head", "head"),
    ):
        assert _category(module) == name


def test_what_is_refused(tmp_path: Path) -> None:
    config = FrodConfig(target_modules=["q_proj"], progressbar=False, save_projection=False)
    peft_types.make(tmp_path, "llama", config)
    with pytest.raises(ModelError, match="no basis 'self_attn_q_proj' is saved"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
