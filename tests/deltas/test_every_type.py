"""Every type of PEFT has a format, or a reason why it has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_model
from peft import LNTuningConfig, PeftType, SupertuningConfig, TrainableTokensConfig
from safetensors.torch import load_file, save_file

import mergebench
from mergebench.deltas import formats
from mergebench.deltas.open import open_model
from mergebench.deltas.peft.refused import NO_DIFFERENCE, NOT_IN_THE_FILE
from mergebench.errors import ModelError
from tests.deltas import peft_types

TYPES = sorted(kind.value for kind in PeftType)
REASONS = {**NO_DIFFERENCE, **NOT_IN_THE_FILE}


def _directory(folder: Path, kind: str) -> str:
    """A base, and a directory of this type with a tensor of no known name."""
    write_model(folder / "base", {"layer.weight": torch.ones(2, 2)})
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    save_file({"strange": torch.ones(2)}, folder / "adapter" / "adapter_model.safetensors")
    return f"{folder / 'base'}+{folder / 'adapter'}"


@pytest.mark.parametrize("kind", TYPES)
def test_has_a_format_or_a_reason(tmp_path: Path, kind: str) -> None:
    has = kind.lower() in formats.names()
    assert not (has and kind in REASONS)
    assert has or kind in REASONS
    with pytest.raises(ModelError) as refused:
        open_model(_directory(tmp_path, kind))
    if has:
        assert "is not supported, only" not in str(refused.value)
    else:
        assert str(refused.value).endswith(f": {REASONS[kind]}") and f"adapter type {kind} " in str(refused.value)


@pytest.mark.parametrize("kind", REASONS)
def test_the_reason_is_given_for_a_fold(tmp_path: Path, kind: str) -> None:
    base, _, adapter = _directory(tmp_path, kind).partition("+")
    with pytest.raises(ModelError, match=REASONS[kind]):
        mergebench.plan_fold(base, adapter)


NAMES: list[Any] = [
    pytest.param(SupertuningConfig(sparsity=0.9, r=2, target_modules=["q_proj"]), id="vectors and layers"),
    pytest.param(LNTuningConfig(target_modules=["norm"]), id="whole layers"),
    pytest.param(TrainableTokensConfig(token_indices=[1]), id="rows"),
]


@pytest.mark.parametrize("config", NAMES)
def test_names_with_the_adapters_own(tmp_path: Path, config: Any) -> None:
    """Some programs leave PEFT's `.default` in the names."""
    peft_types.make(tmp_path, "llama", config)
    reference, file = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", tmp_path / "adapter" / "adapter_model.safetensors"
    expected = open_model(reference).state_dict()
    tensors = {
        f"{name.removesuffix('.weight')}.default{'.weight' if name.endswith('.weight') else ''}": value
        for name, value in load_file(file).items()
    }
    save_file(tensors, file)
    state = open_model(reference).state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_reasons_are_for_types_that_exist() -> None:
    assert REASONS.keys() <= set(TYPES)


def test_an_unknown_type(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter type 'LATER' is not supported, only .*\bHIRA\b.*\bSHIRA\b"):
        open_model(_directory(tmp_path, "LATER"))
