"""The basic operations of merge methods, each chosen for its cost on a chunk in the cache.

All work on float32 [models, elements], never write into their input, and give the same bits for an element wherever the
chunk's borders fall. So they use no fused multiply-add, and no reduction over a dimension whose order depends on the
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:  # listing the methods must not wait for torch
    from torch import Tensor


def total(values: Tensor | Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The (weighted) sum over the models [elements], added one by one in recipe order."""
    rows = list(values.unbind() if isinstance(values, torch.Tensor) else values)
    if weights:
        rows = [row if weight == 1 else row * weight for row, weight in zip(rows, weights, strict=True)]
    result: Tensor = rows[0] + rows[1] if len(rows) > 1 else rows[0].clone()
    for row in rows[2:]:
        result += row
    return result


def times(values: Tensor, factor: float) -> Tensor:
    """Values times a number."""
    return values if factor == 1 else values * factor


def weighted(values: Tensor, weights: Sequence[float]) -> Tensor:
    """Each model's row times its weight."""
    return values if all(weight == 1 for weight in weights) else values * column(values, weights)


def column(values: Tensor, numbers: Sequence[float]) -> Tensor:
    """One number for each model, as [models, 1], with the dtype and device of `values`."""
    return torch.tensor(numbers, dtype=values.dtype, device=values.device).unsqueeze(1)


def keep(values: Tensor, mask: Tensor) -> Tensor:
    """Values where the mask (bool) is true, zero elsewhere."""
    if values.device.type == "cpu":  # NumPy, because torch takes three times as long to turn a mask into numbers
        return torch.from_numpy(np.multiply(values.numpy(), mask.numpy()))
    return values * mask


def clamp(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Values limited to [low, high], each [models, 1]."""
    return torch.minimum(torch.maximum(values, low), high)


def plus_or_minus(values: Tensor) -> Tensor:
    """Minus one where a value is below zero, plus one elsewhere."""
    return values.sign().add_(0.5).sign_()


def trim(values: Tensor, threshold: Tensor, most: Tensor | None = None) -> Tensor:
    """Values with magnitude at or above `threshold` (and at or below `most`) [models, 1], zero elsewhere."""
    # hardshrink keeps |x| > limit: the largest float below the threshold makes that "at or above"
    limits = np.nextafter(threshold.cpu().numpy(), np.float32(-np.inf)).ravel().tolist()
    out = torch.empty_like(values)
    for row, target, limit in zip(values.unbind(), out.unbind(), limits, strict=True):
        if limit < 0:
            target.copy_(row)
        else:
            torch.hardshrink(row, limit, out=target)
    if most is not None:
        for target, limit in zip(out, most.ravel().tolist(), strict=True):
            target -= torch.hardshrink(target, limit)
    return out


def by_rank(values: Tensor, numbers: Tensor) -> Tensor:
    """numbers[r] where a value has rank r among the magnitudes of its row [rows, columns].

    Equal magnitudes are ranked in their order in the row.
    """
    magnitudes = values.abs()
    if values.device.type == "cpu":
        # Magnitude and place as one integer: sorting these takes a third of an argsort's time (a stable one's: a
        # twentieth), and the outcome is the same on every machine. Floats above zero are ordered as their bits are.
        keys = magnitudes.numpy().view(np.uint32).astype(np.uint64)
        keys <<= np.uint64(32)
        keys |= np.arange(values.shape[1], dtype=np.uint64)
        keys.sort(axis=1)
        keys &= np.uint64(0xFFFFFFFF)
        order = torch.from_numpy(keys.view(np.int64))
    else:
        order = torch.argsort(magnitudes, dim=1, stable=True)
    return magnitudes.scatter_(1, order, numbers.expand(values.shape))


def rescale(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(values - low) / (high - low) with bounds [models, 1]; zero in a row where low equals high."""
    width = high - low
    return (values - low) / torch.where(width > 0, width, torch.inf)


def exp(values: Tensor) -> Tensor:
    """e^values. On a CPU by NumPy, which takes a third of torch's time here."""
    return torch.from_numpy(np.exp(values.numpy())) if values.device.type == "cpu" else values.exp()


def log(values: Tensor) -> Tensor:
    """The natural logarithm. On a CPU by NumPy, as `exp`."""
    return torch.from_numpy(np.log(values.numpy())) if values.device.type == "cpu" else values.log()


def tanh(values: Tensor) -> Tensor:
    """The hyperbolic tangent. On a CPU by NumPy, which takes a tenth of torch's time here."""
    return torch.from_numpy(np.tanh(values.numpy())) if values.device.type == "cpu" else values.tanh()


def rows_of(values: Tensor, shape: Sequence[int]) -> Tensor:
    """The chunk as [models, rows, columns] of a tensor of this shape, for methods cut by row."""
    return values.reshape(len(values), -1, shape[-1] if shape else 1)


def row_total(values: Tensor) -> Tensor:
    """The sum over the last dimension, [..., 1], by adding halves, so that the bits of a row do not depend on other
    rows."""
    while (width := values.shape[-1]) > 1:
        half = width // 2
        folded = values[..., :half] + values[..., half : 2 * half]
        if width % 2:
            folded[..., :1] += values[..., -1:]
        values = folded
    return values
