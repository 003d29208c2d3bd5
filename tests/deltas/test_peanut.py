"""PEANuT of all depths, and every activation: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeanutConfig
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

from mergebench.deltas.open import open_model
from mergebench.deltas.peanut import Network, peanut
from mergebench.errors import ModelError
from tests.deltas import peft_types

LAYERS = ["q_proj", "down_proj", "up_proj"]
CASES: dict[str, dict[str, Any]] = {
    "HiWi": {"r": 4, "target_modules": LAYERS},
    "scaled": {"r": 3, "target_modules": LAYERS, "act_fn": "tanh", "scaling": 0.3},
    "one layer": {"r": 3, "target_modules": LAYERS, "depth": 1, "act_fn": "gelu"},
    "three layers, saved whole": {
        "r": 3, "target_modules": LAYERS, "depth": 3, "act_fn": "leaky_relu", "modules_to_save": ["lm_head"],
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_as_peft_merges(tmp_path: Path, case: str) -> None:
    deltas = peft_types.check(tmp_path, "llama", PeanutConfig(**CASES[case]))
    assert {delta.kind for (delta,) in deltas.values()} <= {"peanut", "dense"}


@pytest.mark.parametrize("activation", sorted(ACT2FN))
def test_every_activation(activation: str) -> None:
    try:
        f = ACT2FN[activation]
        f(torch.randn(2, 3))
    except Exception as error:
        pytest.skip(f"not usable here: {error}")
    random = torch.Generator().manual_seed(0)
    weight, a = torch.randn(6, 5, generator=random), torch.randn(2, 6, generator=random)
    b = torch.randn(6, 2, generator=random)
    expected = 0.5 * b @ f(a @ weight)
    torch.testing.assert_close(peanut(Network(b, a, scale=0.5, activation=activation), slice(0, 6), weight), expected)


def test_what_is_refused(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", PeanutConfig(r=3, target_modules=["q_proj"], depth=2))
    config = tmp_path / "adapter" / "adapter_config.json"
    file, reference = tmp_path / "adapter" / "adapter_model.safetensors", f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"depth": 1}))
    with pytest.raises(ModelError, match="depth: 1, but 4 hidden layers"):
        open_model(reference)
    config.write_text(json.dumps(settings | {"act_fn": "sine"}))
    with pytest.raises(ModelError, match="activation 'sine' is not known"):
        open_model(reference)
    config.write_text(json.dumps(settings))
    tensors = load_file(file)
    save_file({name.replace("encoders.1", "encoders.7"): value for name, value in tensors.items()}, file)
    with pytest.raises(ModelError, match=r"encoders and decoders are .*encoders\.7"):
        open_model(reference)
    save_file({name.replace("encoders.1", "encoders.x"): value for name, value in tensors.items()}, file)
    with pytest.raises(ModelError, match=r"peanut_encoders\.x"):
        open_model(reference)
