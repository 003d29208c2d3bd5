"""LoRA of a convolution with a core between its factors (LoCon of LyCORIS, arXiv:2309.14859): a Tucker product.

    W'[o, c, q] = W[o, c, q] + s sum_ij B[o, i] T[i, j, q] A[j, c]

B [rows, r], A [r, in] and T [r, r, kernel]. Taken as a matrix, the tensor has the columns (c, q).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import matrix_shape
from mergebench.checkpoint.kind import delta_kind
from mergebench.deltas import low_rank


@dataclass(frozen=True)
class Tucker:
    """B [rows, r], A [r, in], the core t [r, r, kernel]."""

    b: Tensor
    a: Tensor
    t: Tensor
    scale: float = 1.0


def factors(p: Tucker) -> tuple[Tensor, Tensor]:
    """B, and the A of all columns."""
    return p.scale * p.b, torch.einsum("ijq,jc->icq", p.t, p.a).flatten(1)


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    b, a, t = shapes["b"], shapes["a"], shapes["t"]
    if len(t) != 3 or len(b) != 2 or len(a) != 2 or t[:2] != (b[1], a[0]):
        raise ValueError(f"the core {list(t)} does not fit factors {list(b)} and {list(a)}")
    low_rank.check({"b": b, "a": (b[1], a[1] * t[2])}, settings, shape)


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any] | None:
    rows, columns = matrix_shape(shape)
    if columns % 3:
        return None
    sizes = {"b": (rows, 2), "a": (2, columns // 3), "t": (2, 2, 3)}
    return {name: torch.randn(size, generator=random) for name, size in sizes.items()} | {"scale": 0.5}


@delta_kind(
    paper="arXiv:2309.14859",
    check=_check,
    example=_example,
    **low_rank.made_by(factors, lambda shapes, settings: shapes["b"][1]),
)
def tucker(p: Tucker, tile: slice, base: Tensor | None) -> Tensor:
    """s B (T A): LoRA of a convolution with a core."""
    return low_rank.rows(p, tile, factors)
