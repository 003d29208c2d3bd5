"""A small gated model on disk, probes for it, and what an edit of it must give, by brute force."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import write_model
from torch import Tensor

from mergebench.editing.probes.probe import Probe

WIDTH, NEURONS, LAYERS = 16, 40, 12
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
CONFIG = LLAMA | {"hidden_size": WIDTH, "num_hidden_layers": LAYERS}
GATE = "model.layers.{}.mlp.gate_proj.weight"


def gated(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Twelve layers with a gate, an up and a down matrix each: as text, layer 10 comes before layer 2."""
    random = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(30, WIDTH, generator=random)}
    for layer in range(LAYERS):
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.{layer}.mlp.{name}.weight"] = torch.randn(NEURONS, WIDTH, generator=random)
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = torch.randn(WIDTH, NEURONS, generator=random)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_probe(file: Path, weight: Tensor, **about: object) -> Path:
    """A probe with this weight [2, d]."""
    return Probe(weight, torch.zeros(2), (weight[1] - weight[0]) * 3, about).save(file).file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """bfloat16, in three shards."""
    return write_model(tmp_path / "model", gated(torch.bfloat16), shards=3, config=CONFIG)


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    random = torch.Generator().manual_seed(7)
    return write_probe(tmp_path / "probe.safetensors", torch.randn(2, WIDTH, generator=random))
