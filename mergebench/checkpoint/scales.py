"""FP8 checkpoints: values of eight bits, and scales that turn them into what they stand for.

A scale is one number a tensor, one a row, or one a block of 128 x 128 elements; the value is always the
stored one times the scale, also where its name ends in `_inv`. Here scales are found, by headers alone, and
their tensors taken out of the model; `read.Scales` multiplies chunks while they stream.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from mergebench.checkpoint.header import FLOATS, FP8, Scale, TensorInfo
from mergebench.errors import ModelError

BLOCK = (128, 128)
SETTINGS = ("quantization_config", "compression_config")  # what config.json says of scales
_ENDS = ("_scale_inv", "_scale")
_ACTIVATIONS = re.compile(r"(^|\.)(input_scale|input_scale_ub|output_scale|activation_scale|[qkv]_scale)$")


def find_scales(reference: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """A model's tensors without those that hold scales; each FP8 tensor knows its own.

    `ModelError` where a scale does not fit, or is missing in a model that says it is quantized.
    """
    found, used = dict(tensors), set()
    settings = next((config[key] for key in SETTINGS if isinstance(config.get(key), dict)), None)
    for name, info in tensors.items():
        if info.dtype not in FP8:
            continue
        scale = next((tensors[name + end] for end in _ENDS if name + end in tensors), None)
        if scale is not None:
            used.add(scale.name)
            found[name] = info._replace(scale=_fitted(reference, info, scale, settings or {}))
        elif settings is not None:
            wanted = " or ".join(name + end for end in _ENDS)
            raise ModelError(f"{name}: {reference} has {info.dtype} and no scale", f"it would be called {wanted}")
    return {
        name: info
        for name, info in found.items()
        if name not in used and not (info.numel == 1 and _ACTIVATIONS.search(name))
    }


def without_scales(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that no longer says the model is quantized."""
    return {
        key: without_scales(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in SETTINGS
    }


def _fitted(reference: str, info: TensorInfo, scale: TensorInfo, settings: Mapping[str, Any]) -> Scale:
    """The scale with the size of its blocks, side by side with the tensor's."""
    shape = scale.shape
    if math.prod(shape) == 1:
        shape = (1,) * len(info.shape)
    elif len(shape) == 1 and len(info.shape) > 1:  # one a row
        shape = (*(1,) * (len(info.shape) - 2), *shape, 1)
    sizes = settings.get("weight_block_size")
    given = isinstance(sizes, list) and len(sizes) == 2 and all(isinstance(size, int) and size > 0 for size in sizes)
    usual = (*(1,) * (len(info.shape) - 2), *(sizes if given and isinstance(sizes, list) else BLOCK))[-len(shape) :]
    blocks = []
    for side, count, block in zip(info.shape, shape, usual, strict=False):
        blocks.append(max(side, 1) if count == 1 else 1 if count == side else block)
    if (
        scale.dtype not in FLOATS
        or len(shape) != len(info.shape)
        or any(-(-side // block) != count for side, block, count in zip(info.shape, blocks, shape, strict=True) if side)
    ):
        what = f"{scale.dtype} {list(scale.shape)}, the tensor has {list(info.shape)}"
        hint = f"a scale is float: one number, one a row, or one a block of {usual[0]} x {usual[-1]}"
        raise ModelError(f"{scale.name}: {reference} has {what}", hint)
    return Scale(scale, shape, tuple(blocks))
