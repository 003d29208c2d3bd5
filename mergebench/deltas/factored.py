"""PELA's layers (arXiv:2310.10700): a weight that is the product of two matrices, whatever the base's was.

W' = B A        (B [rows, r], A [r, columns])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.kind import delta_kind
from mergebench.deltas import low_rank


@dataclass(frozen=True)
class Product:
    """B [rows, r], A [r, columns]."""

    b: Tensor
    a: Tensor


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    parts = low_rank.some_factors(shape, random)
    return {"b": parts["b"], "a": parts["a"]}


@delta_kind(
    paper="arXiv:2310.10700",
    needs_base=True,
    folds=lambda p, tile, base: p.b[tile] @ p.a,
    check=low_rank.check,
    example=_example,
    label=low_rank.label,
)
def factored(p: Product, tile: slice, base: Tensor | None) -> Tensor:
    """B A - W: PELA."""
    assert base is not None
    return p.b[tile] @ p.a - base
