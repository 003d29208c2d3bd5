"""TinyLoRA (arXiv:2602.04118): a small matrix between two fixed factors, a mixture of fixed random ones.

    W' = W + B (sum_i v_i P_i) A

B [rows, r] and A [r, columns] come from the singular vectors of W; P [u, r, r]; v [u] is trained, for one layer or
several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.kind import delta_kind
from mergebench.deltas import low_rank


@dataclass(frozen=True)
class Core:
    """B [rows, r], A [r, columns], P [u, r, r], v [u]."""

    b: Tensor
    a: Tensor
    projections: Tensor
    vector: Tensor
    columns: bool = False  # outputs are columns of the stored tensor: then B and A are swapped, and P turned


def factors(p: Core) -> tuple[Tensor, Tensor]:
    """B and A, with the core multiplied into the B."""
    core = torch.tensordot(p.vector, p.projections, 1)
    return p.b @ (core.T if p.columns else core), p.a


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    low_rank.check({"b": shapes["b"], "a": shapes["a"]}, settings, shape)
    rank = shapes["a"][0]
    if shapes["projections"] != (*shapes["vector"], rank, rank) or len(shapes["vector"]) != 1:
        raise ValueError(f"projections {list(shapes['projections'])} and vector {list(shapes['vector'])} do not fit")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    parts = low_rank.some_factors(shape, random)
    more = {"projections": torch.randn(4, 2, 2, generator=random), "vector": torch.randn(4, generator=random)}
    return {"b": parts["b"], "a": parts["a"], "columns": shape[0] > shape[-1]} | more


@delta_kind(
    paper="arXiv:2602.04118",
    check=_check,
    example=_example,
    **low_rank.made_by(factors, lambda shapes, settings: min(shapes["b"])),
)
def projected_core(p: Core, tile: slice, base: Tensor | None) -> Tensor:
    """B (sum_i v_i P_i) A: TinyLoRA."""
    return low_rank.rows(p, tile, factors)
