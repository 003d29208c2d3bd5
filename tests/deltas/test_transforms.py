"""FourierFT: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import FourierFTConfig

from mergebench.deltas.fourier import drawn
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

TARGETS = ["q_proj", "v_proj", "down_proj"]
CONV = ["c_attn", "mlp.c_proj"]
CASES: list[Any] = [
    pytest.param("llama", FourierFTConfig(n_frequency=30, target_modules=TARGETS), "fourier", id="FourierFT"),
    pytest.param(
        "llama",
        FourierFTConfig(n_frequency=128, scaling=3.5, random_loc_seed=5, target_modules=["v_proj"]),
        "fourier",
        id="all frequencies",
    ),
    pytest.param(
        "llama",
        FourierFTConfig(
            n_frequency=9,
            n_frequency_pattern={"v_proj": 100},
            target_modules=TARGETS,
            modules_to_save=["lm_head"],
        ),
        "fourier",
        id="patterns, whole",
    ),
    pytest.param(
        "gpt2",
        FourierFTConfig(n_frequency=50, target_modules=CONV, fan_in_fan_out=True),
        "fourier",
        id="FourierFT, Conv1D",
    ),
]


@pytest.mark.parametrize(("family", "config", "kind"), CASES)
def test_as_peft_merges(tmp_path: Path, family: str, config: Any, kind: str) -> None:
    deltas = peft_types.check(tmp_path, family, config)
    assert {delta.kind for (delta,) in deltas.values()} <= {kind, "dense"}


@pytest.mark.parametrize(("numel", "count", "seed"), [(1, 1, 0), (7, 7, 777), (4096, 4095, 3), (1 << 20, 300, -1)])
def test_places_are_those_of_torch(numel: int, count: int, seed: int) -> None:
    expected = torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:count]
    assert torch.equal(drawn(count, numel, seed), expected)


REFUSED: list[Any] = [
    pytest.param({"random_loc_seed": None}, "random_loc_seed and scaling must be numbers", id="no seed"),
    pytest.param({"scaling": "many"}, "random_loc_seed and scaling must be numbers", id="no scale"),
]


@pytest.mark.parametrize(("settings", "error"), REFUSED)
def test_refused(tmp_path: Path, settings: dict[str, Any], error: str) -> None:
    peft_types.make(tmp_path, "llama", FourierFTConfig(n_frequency=9, target_modules=["q_proj"]))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(ModelError, match=error):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
