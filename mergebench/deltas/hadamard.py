"""LoHa (FedPara, arXiv:2108.06098): two low-rank matrices, multiplied element by element.

    W' = W + s (B1 A1) * (B2 A2)        (* element by element)

B [rows, r], A [r, columns]. Of a convolution in Tucker form, A [r, in] and t [r, r, kernel] make the A of all columns:
A[i, (c, q)] = sum_j t[i, j, q] a[j, c].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import matrix_shape
from mergebench.checkpoint.kind import delta_kind
from mergebench.deltas import low_rank


@dataclass(frozen=True)
class Hadamard:
    """B1, B2 [rows, r], A1, A2 [r, columns]; or A1, A2 [r, in] and t1, t2 [r, r, kernel]."""

    b1: Tensor
    a1: Tensor
    b2: Tensor
    a2: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None
    scale: float = 1.0


def _columns(a: Tensor, t: Tensor | None) -> Tensor:
    """A [r, columns]."""
    return a if t is None else torch.einsum("ijq,jc->icq", t, a).flatten(1)


def _whole(p: Hadamard) -> Hadamard:
    return replace(p, a1=_columns(p.a1, p.t1), a2=_columns(p.a2, p.t2), t1=None, t2=None)


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    for number in "12":
        a, t = shapes[f"a{number}"], shapes.get(f"t{number}")
        if t is not None:
            if len(t) != 3 or len(a) != 2 or t[:2] != (a[0], a[0]):
                raise ValueError(f"t{number} {list(t)} does not fit a factor {list(a)}")
            a = (a[0], a[1] * t[2])
        low_rank.check({"b": shapes[f"b{number}"], "a": a}, settings, shape)


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    tucker = rows == 1
    parts: dict[str, Any] = {"scale": 0.5}
    for number in "12":
        parts[f"b{number}"] = torch.randn(rows, 2, generator=random)
        parts[f"a{number}"] = torch.randn(2, columns // 3 if tucker else columns, generator=random)
        if tucker:
            parts[f"t{number}"] = torch.randn(2, 2, 3, generator=random)
    return parts


@delta_kind(
    paper="arXiv:2108.06098",
    prepare=lambda p, base, shape: _whole(p),
    made=lambda shapes, settings, shape: 8 * shapes["a1"][0] * matrix_shape(shape)[1] if "t1" in shapes else 0,
    check=_check,
    example=_example,
    label=lambda parts, settings: f"rank {min(parts['b1'].shape)}",
)
def hadamard(p: Hadamard, tile: slice, base: Tensor | None) -> Tensor:
    """s (B1 A1) * (B2 A2): LoHa."""
    p = _whole(p)
    return (p.scale * p.b1[tile] @ p.a1) * (p.b2[tile] @ p.a2)
