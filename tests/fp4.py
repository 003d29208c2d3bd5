"""Small models in four bits, written by hand, and what they stand for by the plainest means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from models import read_model, write_model
from torch import Tensor

import mergebench

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def merged(recipe: dict[str, Any], **how: Any) -> dict[str, Tensor]:
    """The tensors of a merge into `out`."""
    plan = mergebench.plan(mergebench.load({"merge_method": "linear"} | recipe), **how)
    return read_model(mergebench.run(plan, "out", overwrite=True).out)


def unpacked(codes: Tensor) -> Tensor:
    """The two values of each byte, the low half first."""
    both = torch.stack([codes & 15, codes >> 4], -1)
    return E2M1[both.long()].flatten(-2)


def blocks(shape: tuple[int, int, int], seed: int, low: int = 115, high: int = 125) -> tuple[Tensor, Tensor]:
    """Random MXFP4 blocks and scales of experts, rows and columns as they lie in the file."""
    experts, rows, columns = shape
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (experts, rows, columns // 32, 16), generator=random, dtype=torch.uint8)
    return codes, torch.randint(low, high, (experts, rows, columns // 32), generator=random, dtype=torch.uint8)


def means(codes: Tensor, scales: Tensor) -> Tensor:
    """The experts that MXFP4 blocks stand for, turned as in a model of transformers: float64."""
    values = unpacked(codes).double() * 2.0 ** (scales.double() - 127)[..., None]
    return values.flatten(-2).transpose(-1, -2)


def tiny_gpt_oss(**more: Any) -> Any:
    """A GptOssForCausalLM with random weights."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 3,
        "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**sizes | more)).to(torch.bfloat16)


def write_mxfp4(directory: Path, model: Any, seed: int) -> dict[str, Tensor]:
    """A gpt-oss model with random experts in MXFP4; returns what its tensors stand for, as bfloat16."""
    about = {"architectures": ["GptOssForCausalLM"], "quantization_config": MXFP4, "dtype": "bfloat16"}
    config = json.loads(model.config.to_json_string()) | about
    tensors: dict[str, Tensor] = {}
    real: dict[str, Tensor] = {}
    for number, (name, value) in enumerate(model.state_dict().items()):
        moved = value + (0.01 * seed * torch.randn(value.shape)).bfloat16()
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = real[name] = moved
            continue
        experts, columns, rows = value.shape
        codes, scales = blocks((experts, rows, columns), 100 * seed + number)
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": scales}
        real[name] = means(codes, scales).bfloat16()
    write_model(directory, tensors, config=config)
    return real


def nvfp4(
    name: str, shape: tuple[int, int], seed: int, layout: str = "modelopt"
) -> tuple[Mapping[str, Tensor], Tensor]:
    """A random NVFP4 matrix as either library stores it, and what it stands for in float32."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (shape[0], shape[1] // 2), generator=random, dtype=torch.uint8)
    scales = (torch.rand(shape[0], shape[1] // 16, generator=random) * 400 + 1).to(torch.float8_e4m3fn)
    whole = torch.tensor(0.0003) if layout == "modelopt" else torch.tensor([3000.0])
    scale = scales.float() * whole if layout == "modelopt" else scales.float() / whole
    value = (unpacked(codes).view(shape[0], -1, 16) * scale[..., None]).view(shape)
    if layout == "modelopt":
        return {name: codes, f"{name}_scale": scales, f"{name}_scale_2": whole}, value
    return {f"{name}_packed": codes, f"{name}_scale": scales, f"{name}_global_scale": whole}, value
