"""FP8 checkpoints: eight-bit values, and the scales that dequantize them.

A scale is one number per tensor, per row, or per block of 128 x 128 elements. The value is always the stored value
times the scale, even if the scale's name ends in `_inv`. This file finds the scales by headers alone and removes their
tensors from the model; `Scales` multiplies chunks while they stream.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench.checkpoint.header import FLOATS, FP8, Reader, Scale, TensorInfo
from mergebench.errors import ModelError

if TYPE_CHECKING:  # torch is imported to read values, not to read headers
    from torch import Tensor

BLOCK = (128, 128)
SETTINGS = ("quantization_config", "compression_config")  # keys of config.json about scales
ENDS = ("_scale_inv", "_scale")
_ACTIVATIONS = re.compile(
    r"(^|\.)(input_scale|input_scale_ub|input_global_scale|output_scale|activation_scale|[qkv]_scale)$"
)


def find_scales(reference: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """A model's tensors without those that hold scales; each FP8 tensor knows its own.

    `ModelError` if a scale does not fit, or is missing although the config says that the model is quantized.
    """
    found, used = dict(tensors), set()
    settings = next((config[key] for key in SETTINGS if isinstance(config.get(key), dict)), None)
    for name, info in tensors.items():
        if info.dtype not in FP8:
            continue
        scale = next((tensors[name + end] for end in ENDS if name + end in tensors), None)
        if scale is not None:
            used.add(scale.name)
            found[name] = info._replace(scale=_fitted(reference, info, scale, settings or {}))
        elif settings is not None:
            wanted = " or ".join(name + end for end in ENDS)
            raise ModelError(f"{name}: {reference} has {info.dtype} and no scale", f"it would be called {wanted}")
    return {name: info for name, info in found.items() if name not in used and not is_of_activations(info)}


def is_of_activations(info: TensorInfo) -> bool:
    """Whether a tensor is a scale of a layer's input or output, which says nothing of its weight."""
    return info.numel == 1 and _ACTIVATIONS.search(info.name) is not None


def without_scales(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that no longer says the model is quantized."""
    return {
        key: without_scales(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in SETTINGS
    }


def _fitted(reference: str, info: TensorInfo, scale: TensorInfo, settings: Mapping[str, Any]) -> Scale:
    """The scale, with the size of its blocks along each dimension of the tensor."""
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
        scale.dtype not in FLOATS | {"F8_E8M0"}  # powers of two
        or len(shape) != len(info.shape)
        or any(-(-side // block) != count for side, block, count in zip(info.shape, blocks, shape, strict=True) if side)
    ):
        what = f"{scale.dtype} {list(scale.shape)}, the tensor has {list(info.shape)}"
        hint = f"a scale is float: one number, one a row, or one a block of {usual[0]} x {usual[-1]}"
        raise ModelError(f"{scale.name}: {reference} has {what}", hint)
    return Scale(scale, shape, tuple(blocks))


class Scaler:
    """The scale of one tensor in memory: multiplies any piece of it, a row or many at a time."""

    def __init__(self, info: TensorInfo, scale: Tensor) -> None:
        assert info.scale is not None
        self.shape, self.blocks = info.shape, info.scale.blocks
        self.scale = scale.float().reshape(-1, info.scale.shape[-1] if info.scale.shape else 1)
        self.sides = info.scale.shape
        self.columns = info.shape[-1] if info.shape else 1

    def multiply(self, start: int, out: Tensor) -> None:
        """out *= scale[start : start + len(out)] (flat elements)."""
        if self.scale.numel() == 1:
            out.mul_(self.scale.reshape(()))
            return
        at, columns = 0, self.columns
        while at < len(out):  # the rest of a row, then whole rows, then the start of a row
            row, column = divmod(start + at, columns)
            size = min(columns - column, len(out) - at)
            if size == columns:
                size = (len(out) - at) // columns * columns
            piece = out[at : at + size]
            factors = self.scale[self.rows(row, row + -(-size // columns))]
            if self.scale.shape[1] == 1:
                piece.view(len(factors), -1).mul_(factors)
            elif size >= columns and columns % self.blocks[-1] == 0:
                piece.view(len(factors), factors.shape[1], -1).mul_(factors[:, :, None])
            else:
                wide = factors.repeat_interleave(self.blocks[-1], 1)[:, column : column + min(size, columns)]
                piece.view(len(factors), -1).mul_(wide)
            at += size

    def rows(self, first: int, stop: int) -> Tensor:
        """The rows of the scale for rows of the tensor; all dimensions but the last are flattened."""
        import torch

        rows = torch.arange(first, stop, device=self.scale.device)
        found, stride = torch.zeros_like(rows), 1
        for side, block, count in zip(self.shape[-2::-1], self.blocks[-2::-1], self.sides[-2::-1], strict=True):
            found += rows % side // block * stride
            rows, stride = rows // side, stride * count
        return found


class Scales:
    """FP8 values times their scales; the scales of the tensors read last stay in memory."""

    KEPT = 64

    def __init__(self, files: Reader) -> None:
        self._files = files
        self._kept: dict[tuple[Path, int], Scaler] = {}

    def multiply(self, tensor: TensorInfo, start: int, out: Tensor) -> None:
        """out *= the scales of the stored elements from `start`; does nothing for a tensor without a scale."""
        from mergebench.checkpoint.files import whole

        if tensor.scale is None:
            return
        key = (tensor.file, tensor.offset)
        if key not in self._kept:
            if len(self._kept) >= self.KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = Scaler(tensor, whole(self._files, tensor.scale.stored).to(out.device))
        self._kept[key].multiply(start, out)
