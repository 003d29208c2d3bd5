"""Recipes of slices, and models with layers of more than one kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import read_model, write_model

import mergebench


def source(model: str, first: int, end: int, **more: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, end], **more}


def recipe(method: str, *slices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "slices": [{"sources": sources} for sources in slices], **more}


def merged(data: dict[str, Any]) -> dict[str, torch.Tensor]:
    return read_model(mergebench.run(mergebench.plan(mergebench.load(data)), "out").out)


LLAMA = ["embed_tokens.weight", "norm.weight"]
MOE = {"model_type": "deepseek_v3", "num_hidden_layers": 4, "first_k_dense_replace": 1}
DENSE, SPARSE = ["mlp.up_proj.weight"], ["mlp.gate.weight", "mlp.experts.0.up_proj.weight"]
MIXED = [DENSE, SPARSE, SPARSE, SPARSE]


def write_mixed(directory: Path, seed: int, config: dict[str, Any], kinds: list[list[str]] = MIXED) -> Path:
    """A model with layers of more than one kind."""
    random = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{at}.{name}" for at, kind in enumerate(kinds) for name in ["self_attn.q.weight", *kind]]
    tensors = {name: torch.randn(4, 4, generator=random) for name in [*(f"model.{one}" for one in LLAMA), *names]}
    return write_model(directory, tensors, config=config)


def stacked(*ranges: tuple[str, int, int]) -> dict[str, Any]:
    return recipe("passthrough", *([source(*one)] for one in ranges))
