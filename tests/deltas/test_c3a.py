"""C3A: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import C3AConfig
from safetensors.torch import load_file, save_file

from mergebench.checkpoint.files import Files
from mergebench.deltas import verbs
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

TARGETS = ["q_proj", "v_proj", "down_proj"]
# PEFT puts it on no Conv1D.
CASES: list[Any] = [
    pytest.param({"block_size": 8, "target_modules": TARGETS}, id="blocks"),
    pytest.param({"block_size": 1, "target_modules": TARGETS}, id="numbers"),
    pytest.param({"block_size": 16, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, id="one, whole"),
    pytest.param({"block_size": 8, "block_size_pattern": {"v_proj": 4}, "target_modules": TARGETS}, id="patterns"),
]


@pytest.mark.parametrize("settings", CASES)
def test_as_peft_merges(tmp_path: Path, settings: dict[str, Any]) -> None:
    deltas = peft_types.check(tmp_path, "llama", C3AConfig(**settings))
    assert {delta.kind for (delta,) in deltas.values()} <= {"circulant", "dense"}
    with Files() as files:
        for (delta,) in deltas.values():
            if delta.kind == "circulant":  # the kind's example has no larger blocks
                full = verbs.materialise(files, delta).double()
                assert verbs.energy(files, delta) == pytest.approx(float(full.square().sum()), rel=1e-6)


def test_refused(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", C3AConfig(block_size=8, target_modules=["q_proj"]))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    for value, error in (
        (torch.zeros(2, 1, 8), r"the kernels make \[16, 8\], base has \[16, 16\]"),
        (torch.zeros(2, 8), r"kernel is F32 \[2, 8\]"),
    ):
        save_file(tensors | {key: value}, file)
        with pytest.raises(ModelError, match=error):
            open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
