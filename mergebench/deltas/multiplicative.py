"""W times a low-rank matrix, element by element: HiRA, and HUT in its residual form.

    W' = W + s W * (B A)        (* element by element)

B [rows, r], A [r, columns]. HiRA (Huang et al., ICLR 2025) has s = 1; HUT (arXiv:2409.13501) multiplies W with one plus
a low-rank matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mergebench.checkpoint.kind import delta_kind
from mergebench.deltas import low_rank


@dataclass(frozen=True)
class Factors:
    """B [rows, r], A [r, columns]."""

    b: Tensor
    a: Tensor
    scale: float = 1.0


@delta_kind(
    paper="arXiv:2409.13501",
    needs_base=True,
    check=low_rank.check,
    example=low_rank.some_factors,
    label=low_rank.label,
)
def multiplicative(p: Factors, tile: slice, base: Tensor | None) -> Tensor:
    """s W * (B A): HiRA, HUT."""
    assert base is not None
    return base * (p.scale * p.b[tile] @ p.a)
