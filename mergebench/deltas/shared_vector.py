"""Uni-LoRA (arXiv:2506.00799): both factors of every layer are picked from one trained vector.

    W' = W + B A;  B = v[index_b] * scale_b, A = v[index_a] * scale_a

v [d]; index_b and scale_b [rows, r], index_a and scale_a [r, columns]. The scales make the projection isometric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import matrix_shape
from mergebench.checkpoint.kind import delta_kind
from mergebench.checkpoint.parts import Indices
from mergebench.deltas import low_rank


@dataclass(frozen=True)
class Picked:
    """v [d], and for each factor where its elements are in v, and what they are multiplied by."""

    vector: Tensor
    index_b: Indices
    index_a: Indices
    scale_b: Tensor
    scale_a: Tensor


def factors(p: Picked) -> tuple[Tensor, Tensor]:
    """B and A, picked from the vector."""
    return p.vector[p.index_b] * p.scale_b, p.vector[p.index_a] * p.scale_a


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    low_rank.check({"b": shapes["index_b"], "a": shapes["index_a"]}, settings, shape)
    for factor in "ba":
        index, scale = shapes[f"index_{factor}"], shapes[f"scale_{factor}"]
        if index != scale:
            raise ValueError(f"scales {list(scale)} of the indices {list(index)}")
    if len(shapes["vector"]) != 1:
        raise ValueError(f"a vector {list(shapes['vector'])}")


def _validate(p: Any, shape: tuple[int, ...]) -> None:
    for index in (p.index_b, p.index_a):
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(p.vector):
            raise ValueError(f"an index beyond the vector of {len(p.vector)}")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    parts: dict[str, Any] = {"vector": torch.randn(5, generator=random)}
    for factor, size in (("b", (rows, 2)), ("a", (2, columns))):
        parts[f"index_{factor}"] = torch.randint(5, size, generator=random)
        parts[f"scale_{factor}"] = torch.rand(size, generator=random)
    return parts


@delta_kind(
    paper="arXiv:2506.00799",
    check=_check,
    validate=_validate,
    example=_example,
    **low_rank.made_by(factors, lambda shapes, settings: shapes["index_a"][0]),
)
def shared_vector(p: Picked, tile: slice, base: Tensor | None) -> Tensor:
    """B A with elements picked from one vector: Uni-LoRA."""
    return low_rank.rows(p, tile, factors)
