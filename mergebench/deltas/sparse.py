"""A masked difference: tasks share a vector, and each has a mask, as in EMR-Merging (arXiv:2405.17461)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.kind import delta_kind
from mergebench.checkpoint.parts import Mask, Rows


@dataclass(frozen=True)
class Masked:
    """A vector of the tensor's shape, and a bit for each of its elements."""

    vector: Rows
    mask: Mask
    scale: float = 1.0


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    packed = torch.randint(256, ((math.prod(shape) + 7) // 8,), generator=random, dtype=torch.uint8)
    return {"vector": torch.randn(shape, generator=random), "mask": packed, "scale": 0.75}


@delta_kind(paper="arXiv:2405.17461", example=_example, label=lambda parts, settings: f"mask x {settings['scale']:.4g}")
def sparse(p: Masked, tile: slice, base: Tensor | None) -> Tensor:
    """scale * mask * vector."""
    return p.vector[tile] * p.scale * p.mask[tile]
