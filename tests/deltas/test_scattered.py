"""SHiRA and Super-Tuning: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ShiraConfig, SupertuningConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergebench
from mergebench.deltas.open import open_model
from mergebench.errors import MergebenchError, ModelError
from tests.deltas import peft_types

TARGETS = ["q_proj", "down_proj"]
# PEFT puts neither on GPT-2's Conv1D.
CASES: list[Any] = [
    pytest.param(ShiraConfig(r=2, target_modules=TARGETS), id="SHiRA"),
    pytest.param(ShiraConfig(r=1, random_seed=3, target_modules=["v_proj"], modules_to_save=["lm_head"]), id="whole"),
    pytest.param(SupertuningConfig(sparsity=0.9, target_modules=TARGETS), id="Super"),
    pytest.param(SupertuningConfig(sparsity=0.5, select_top=False, target_modules=TARGETS), id="smallest"),
    pytest.param(SupertuningConfig(sparsity=0.9, r=2, lora_alpha=3, target_modules=TARGETS), id="Supra"),
    pytest.param(SupertuningConfig(sparsity=0.9, r=2, target_modules=TARGETS), id="Supra, alpha of its own"),
]


@pytest.mark.parametrize("config", CASES)
def test_as_peft_merges(tmp_path: Path, config: Any) -> None:
    deltas = peft_types.check(tmp_path, "llama", config)
    assert {delta.kind for (delta,) in deltas.values()} <= {"scattered", "dense"}


def _edit(folder: Path, config: Any, name: str, change: Any) -> str:
    """An adapter whose first tensor with `name` is changed; None removes it."""
    peft_types.make(folder, "llama", config)
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors: dict[str, Tensor] = load_file(file)
    key = next(key for key in tensors if name in key)
    changed = change(tensors.pop(key))
    save_file(tensors if changed is None else tensors | {key: changed.contiguous()}, file)
    return f"{folder / 'base'}+{folder / 'adapter'}"


REFUSED: list[Any] = [
    pytest.param("shira_indices", lambda at: None, "q_proj: indices are missing", id="missing"),
    pytest.param("shira_indices", lambda at: at.float(), "F32, as PEFT saves them on Windows", id="floats"),
    pytest.param("shira_indices", lambda at: at[:, 1:], r"values \[64\] and indices \[2, 63\]", id="too few"),
    pytest.param("shira_weight", lambda at: None, "q_proj: values is missing", id="no values"),
]


@pytest.mark.parametrize(("name", "change", "error"), REFUSED)
def test_refused(tmp_path: Path, name: str, change: Any, error: str) -> None:
    with pytest.raises(ModelError, match=error):
        open_model(_edit(tmp_path, ShiraConfig(r=2, target_modules=["q_proj"]), name, change))


WRONG: list[Any] = [
    pytest.param(lambda at: at + 16, "elements of another tensor", id="outside"),
    pytest.param(lambda at: at[:, :1].expand(2, 64), "it changes an element twice", id="twice"),
]


@pytest.mark.parametrize(("change", "error"), WRONG)
def test_wrong_positions_are_found_when_they_are_read(tmp_path: Path, change: Any, error: str) -> None:
    reference = _edit(tmp_path, ShiraConfig(r=2, target_modules=["q_proj"]), "shira_indices", change)
    plan = mergebench.plan(mergebench.load({"merge_method": "passthrough", "models": [{"model": reference}]}))
    with pytest.raises(MergebenchError, match=error):
        mergebench.run(plan, tmp_path / "out")


def test_positions_that_are_not_saved(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="save_precomputed_indices"):
        config = SupertuningConfig(sparsity=0.9, target_modules=["q_proj"], save_precomputed_indices=False)
    peft_types.make(tmp_path, "llama", config)
    assert not json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["save_precomputed_indices"]
    with pytest.raises(ModelError, match="q_proj: save_precomputed_indices is off"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")


def test_no_other_element_changes(tmp_path: Path) -> None:
    """An element that has no value keeps its bits, -0.0 too."""
    expected = peft_types.make(tmp_path, "llama", ShiraConfig(r=2, target_modules=["q_proj"]))
    name, file = "model.layers.0.self_attn.q_proj.weight", tmp_path / "base" / "model.safetensors"
    base = load_file(file)
    kept = expected[name] == base[name]
    base[name][kept] = -0.0
    save_file(base, file, metadata={"format": "pt"})
    changed = open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}").state_dict()[name]
    assert kept.any() and torch.equal(changed[kept].view(torch.int32), base[name][kept].view(torch.int32))


@pytest.mark.parametrize(
    ("key", "value", "error"), [("lora_alpha", "much", "it must be a number"), ("r", 2, "B is missing")]
)
def test_factors_without_a_scale_or_missing(tmp_path: Path, key: str, value: Any, error: str) -> None:
    rank = 2 if key == "lora_alpha" else None
    peft_types.make(tmp_path, "llama", SupertuningConfig(sparsity=0.9, r=rank, target_modules=["q_proj"]))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    with pytest.raises(ModelError, match=error):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
