"""FourierFT and WaveFT: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import FourierFTConfig, WaveFTConfig
from peft.tuners.waveft.wavelet import Wavelet

from mergebench.deltas.fourier import drawn
from mergebench.deltas.open import open_model
from mergebench.deltas.wavelet import WAVELETS, filters
from mergebench.errors import ModelError
from tests.deltas import peft_types
from tests.deltas.test_lora import LLAMA

ODD = copy.deepcopy(LLAMA)
ODD.intermediate_size = 23
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
    *(
        pytest.param(
            family,
            WaveFTConfig(
                n_frequency=60, target_modules=targets, wavelet_family=wavelet, fan_in_fan_out=family == "gpt2"
            ),
            "wavelet",
            id=f"{wavelet}, {family}",
        )
        for family, targets in (("llama", TARGETS), ("odd", ["down_proj", "up_proj"]), ("gpt2", CONV))
        for wavelet in ("db1", "db3", "sym4")
    ),
    pytest.param(
        "llama",
        WaveFTConfig(n_frequency=30, scaling=2, random_loc_seed=1, target_modules=TARGETS, use_idwt=False),
        "wavelet",
        id="elements",
    ),
    pytest.param(
        "gpt2",
        WaveFTConfig(n_frequency=30, target_modules=CONV, use_idwt=False, fan_in_fan_out=True),
        "wavelet",
        id="elements, Conv1D",
    ),
    pytest.param(
        "odd",
        WaveFTConfig(
            n_frequency=70,
            n_frequency_pattern={"v_proj": 11},
            target_modules=TARGETS,
            wavelet_family="sym10",
            modules_to_save=["lm_head"],
        ),
        "wavelet",
        id="a filter longer than the matrix, patterns, whole",
    ),
]


@pytest.fixture(autouse=True)
def _odd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peft_types.FAMILIES, "odd", ODD)


@pytest.mark.parametrize(("family", "config", "kind"), CASES)
def test_as_peft_merges(tmp_path: Path, family: str, config: Any, kind: str) -> None:
    deltas = peft_types.check(tmp_path, family, config)
    assert {delta.kind for (delta,) in deltas.values()} <= {kind, "dense"}


@pytest.mark.parametrize(("numel", "count", "seed"), [(1, 1, 0), (7, 7, 777), (4096, 4095, 3), (1 << 20, 300, -1)])
def test_places_are_those_of_torch(numel: int, count: int, seed: int) -> None:
    expected = torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:count]
    assert torch.equal(drawn(count, numel, seed), expected)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_filters(wavelet: str) -> None:
    """Those that PEFT has tables of; orthonormal to even shifts, and as many vanishing moments as there should be."""
    low, high = (np.array(one) for one in filters(wavelet))
    assert np.allclose(low, Wavelet(wavelet).rec_lo, atol=1e-11) and np.allclose(
        high, Wavelet(wavelet).rec_hi, atol=1e-11
    )
    for one, other in ((low, low), (high, high), (low, high)):
        for shift in range(0, len(low), 2):
            expected = 1.0 if shift == 0 and one is other else 0.0
            assert abs(one[shift:] @ other[: len(low) - shift] - expected) < 1e-11
    moments = [np.arange(len(high), dtype=float) ** k @ high for k in range(min(len(low) // 2, 4))]
    assert np.allclose(moments, 0, atol=1e-7)


REFUSED: list[Any] = [
    pytest.param({"random_loc_seed": None}, "random_loc_seed and scaling must be numbers", id="no seed"),
    pytest.param({"scaling": "many"}, "scaling is .many., it must be a number", id="no scale"),
]


@pytest.mark.parametrize(("settings", "error"), REFUSED)
def test_refused(tmp_path: Path, settings: dict[str, Any], error: str) -> None:
    peft_types.make(tmp_path, "llama", FourierFTConfig(n_frequency=9, target_modules=["q_proj"]))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(ModelError, match=error):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")


@pytest.mark.parametrize("family", ["coif1", "db11", None])
def test_unknown_wavelets(tmp_path: Path, family: str | None) -> None:
    """Coiflets are no such factors; coif4 and coif5 in PEFT are no wavelets: not orthonormal."""
    peft_types.make(tmp_path, "llama", WaveFTConfig(n_frequency=9, target_modules=["q_proj"]))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"wavelet_family": family}))
    with pytest.raises(ModelError, match=f"wavelet_family {family!r} is not supported, only db1"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
