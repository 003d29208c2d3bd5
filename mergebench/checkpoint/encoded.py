"""Which tensors of a model are written in eight or four bits, and what its config.json then says.

    float8_e4m3   the tensors that the base stores in FP8, each with the scales it has there. A base without FP8: the
                  linear layers, with a scale for each block of 128 x 128, as transformers' fine-grained FP8 has them
    mxfp4         the tensors that the base stores in MXFP4, or the experts of a gpt-oss model

Everything else keeps its type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergebench.checkpoint.encode import Eight, Encoding, Four
from mergebench.checkpoint.fp4 import GPT_OSS, Packed
from mergebench.checkpoint.fp8 import BLOCK, ENDS, SETTINGS, is_of_activations, without_scales
from mergebench.checkpoint.header import FP8, ITEM_SIZE, TensorInfo
from mergebench.checkpoint.layouts import build, in_memory, renamed
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.shards import OutTensor
from mergebench.errors import ModelError

_EXPERTS = re.compile(r".*\.mlp\.experts\.(gate_up_proj|down_proj)")
_APART = re.compile(r"(.+\.experts)\.\d+\.\w+\.weight")
_KEPT_GPT_OSS = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


@dataclass(frozen=True)
class Encoded:
    """What of an output is in eight or four bits."""

    tensors: Mapping[str, Encoding] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None  # config.json, but for the type of the other tensors


def encoded(base: Model, kind: str) -> Encoded:
    """The encodings of a model's tensors; `ModelError` if there is no layout that transformers would load."""
    floats = {name: info for name, info in base.tensors.items() if info.is_float and info.numel}
    if kind == "mxfp4":
        return _four(base, floats)
    scaled = {name: info for name, info in floats.items() if info.scale is not None and info.dtype in FP8}
    return _as_stored(base, scaled) if scaled else _blocks(base, floats)


def _four(base: Model, floats: Mapping[str, TensorInfo]) -> Encoded:
    found: dict[str, Encoding] = {}
    for name, info in floats.items():
        packed = info.made
        if isinstance(packed, Packed) and packed.form.kind == "MXFP4":
            found[name] = Four(name, info.shape, packed.form, packed)
    if found:
        return Encoded(found, base.config)
    if base.config.get("model_type") != "gpt_oss":
        what = f"out_dtype: mxfp4: {base.reference} stores nothing in MXFP4, and is no gpt-oss model"
        raise ModelError(what, "out_dtype: float8_e4m3 works for any model that transformers knows")
    for name, info in floats.items():
        if _EXPERTS.fullmatch(name) and len(info.shape) == 3:
            if info.shape[1] % GPT_OSS.group:
                what = f"{name}: {list(info.shape)} does not fit into MXFP4: {info.shape[1]} is no multiple of 32"
                raise ModelError(what, "write bfloat16: leave out_dtype out")
            found[name] = Four(name, info.shape, GPT_OSS)
    if not found:
        raise ModelError(f"out_dtype: mxfp4: {base.reference} has no experts as gpt-oss stores them")
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": _KEPT_GPT_OSS}
    return Encoded(found, without_scales(base.config) | {"quantization_config": settings})


def _as_stored(base: Model, scaled: Mapping[str, TensorInfo]) -> Encoded:
    """The layout of a base in FP8."""
    found: dict[str, Encoding] = {}
    for name, info in scaled.items():
        assert info.scale is not None
        stored, grid, blocks = info.scale
        end = next(end for end in ENDS if stored.name.endswith(end))  # in slices, layers have other numbers
        scale = OutTensor(name + end, stored.dtype, stored.shape, stored.nbytes)
        found[name] = Eight(name, info.shape, scale, grid, blocks, info)
    config = dict(base.config)
    settings: Mapping[str, Any] = next((config[key] for key in SETTINGS if isinstance(config.get(key), dict)), {})
    lost = next((info.name for header in base.headers for info in header.tensors if is_of_activations(info)), None)
    if lost is not None and settings.get("quant_method") != "fp8":
        what = (
            f"out_dtype: float8_e4m3: {base.reference} has scales of activations ({lost}), measured on its own weights"
        )
        raise ModelError(what, "write bfloat16, and quantize the result with the tool that made the base")
    if lost is not None:
        config["quantization_config"] = dict(settings) | {"activation_scheme": "dynamic"}
    return Encoded(found, config)


def _blocks(base: Model, floats: Mapping[str, TensorInfo]) -> Encoded:
    """The default layout: linear layers of transformers whose sides are multiples of a block's, and experts apart."""
    import torch

    model = build(base.config)
    layout = in_memory(base.tensors, base.config) if model is not None else {}
    if not layout:
        what = f"out_dtype: float8_e4m3: transformers does not know {base.reference}, so no layout that it would load"
        raise ModelError(what, "write bfloat16: leave out_dtype out")
    names = renamed(layout, {name: info.shape for name, info in base.tensors.items()})
    head = model.get_output_embeddings()
    linear = {name for name, one in model.named_modules() if type(one) is torch.nn.Linear and one is not head}
    found: dict[str, Encoding] = {}
    apart: dict[str, list[bool]] = {}  # by module of experts: whether each matrix fits
    for name, info in floats.items():
        fits = len(info.shape) == 2 and not any(side % block for side, block in zip(info.shape, BLOCK, strict=True))
        expert = _APART.fullmatch(name)
        if expert is not None and name not in names:
            apart.setdefault(expert[1], []).append(fits)
        elif not (fits and names.get(name, "").removesuffix(".weight") in linear):
            continue
        if fits:
            grid = tuple(side // block for side, block in zip(info.shape, BLOCK, strict=True))
            scale = OutTensor(f"{name}_scale_inv", "F32", grid, grid[0] * grid[1] * ITEM_SIZE["F32"])
            found[name] = Eight(name, info.shape, scale, grid, BLOCK)
    mixed = {module for module, fit in apart.items() if not all(fit)}
    found = {name: one for name, one in found.items() if not ((e := _APART.fullmatch(name)) and e[1] in mixed)}
    if not found:
        what = f"out_dtype: float8_e4m3: no linear layer of {base.reference} has sides that are multiples of 128"
        raise ModelError(what, "write bfloat16: leave out_dtype out")
    done = {names[name].removesuffix(".weight") for name in found if name in names}
    done |= apart.keys() - mixed
    modules = {name for name, _ in model.named_modules() if name.endswith(".experts")} | linear
    kept = sorted(modules - done) + [name for name, one in model.named_modules() if one is head]
    settings: dict[str, Any] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK),
        "modules_to_not_convert": kept,
    }  # fmt: skip
    return Encoded(found, without_scales(base.config) | {"quantization_config": settings})
