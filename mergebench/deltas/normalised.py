"""DeLoRA (arXiv:2503.18225): a low-rank change whose directions have norm one, of a bounded strength.

    W' = W + B diag(s / (r |b_i| |a_i|)) A diag(n)

B [rows, r] has the columns b_i, A [r, columns] the rows a_i; s [1] is the strength, n [columns] the norms of the
columns of the W that the adapter was trained on.
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

LEAST = 1e-4  # a smaller norm counts as this


@dataclass(frozen=True)
class Normalised:
    """B [rows, r], A [r, columns], strength [1], norms [columns]."""

    b: Tensor
    a: Tensor
    strength: Tensor
    norms: Tensor


def factors(p: Normalised) -> tuple[Tensor, Tensor]:
    """B and A, with everything else multiplied into them."""
    lengths = p.b.norm(dim=0).clamp(min=LEAST) * p.a.norm(dim=1).clamp(min=LEAST)
    return p.b * (p.strength / len(p.a) / lengths), p.a * p.norms


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    low_rank.check({"b": shapes["b"], "a": shapes["a"]}, settings, shape)
    if shapes["strength"] != (1,) or shapes["norms"] != (matrix_shape(shape)[1],):
        raise ValueError(f"strength {list(shapes['strength'])} or norms {list(shapes['norms'])} do not fit the factors")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    parts = low_rank.some_factors(shape, random)
    norms = torch.rand(matrix_shape(shape)[1], generator=random)
    return {"b": parts["b"], "a": parts["a"], "strength": torch.tensor([3.0]), "norms": norms}


@delta_kind(
    paper="arXiv:2503.18225",
    check=_check,
    example=_example,
    **low_rank.made_by(factors, lambda shapes, settings: shapes["b"][1]),
)
def normalised(p: Normalised, tile: slice, base: Tensor | None) -> Tensor:
    """B diag(s / (r |b_i| |a_i|)) A diag(n): DeLoRA."""
    return low_rank.rows(p, tile, factors)
