"""RandLoRA (arXiv:2502.00987): a change of full rank as a sum of random low-rank products, scaled by trained vectors.

    W' = W + s sum_j B_j diag(l_j) A diag(g_j)        (or its transpose, so that A has the smaller side)

B [>= large, >= n, r] and A [r, 1, >= small] are random, and the same for all layers; l [r, n] and g [n, small] are the
layer's. As PEFT trains it, column q of the flattened [n, r] of B meets row q of the flattened [r, n] of A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import matrix_shape
from mergebench.checkpoint.kind import Misfit, delta_kind
from mergebench.deltas import low_rank


@dataclass(frozen=True)
class RandomBases:
    """l [r, n], g [n, small], B, A."""

    ranks: Tensor
    columns: Tensor
    b: Tensor
    a: Tensor
    large: int
    turned: bool = False  # the stored tensor is [small, large]
    scale: float = 1.0


def factors(p: RandomBases) -> tuple[Tensor, Tensor]:
    """[large, n r] and [n r, small], the first of all B, the second of A with the vectors; or their transposes."""
    n, small = p.columns.shape
    b = p.b[: p.large, :n].flatten(1)
    a = (p.scale * p.ranks[:, :, None] * p.a[:, :, :small] * p.columns).flatten(0, 1)
    return (a.T, b.T) if p.turned else (b, a)


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    large, small = matrix_shape(shape)[:: -1 if settings["turned"] else 1]
    ranks, columns, b, a = (shapes[name] for name in ("ranks", "columns", "b", "a"))
    if settings["large"] != large or columns[1:] != (small,):
        raise Misfit(f"vectors of {list(columns[1:])} for the smaller of {[large, small]}")
    fits = len(ranks) == 2 and len(b) == len(a) == 3 and ranks[1] == columns[0] <= b[1] and b[2] == a[0] == ranks[0]
    if not fits or b[0] < large or a[1] != 1 or a[2] < small:
        raise ValueError(f"no bases for {list(ranks)} vectors and {[large, small]} in {list(b)} and {list(a)}")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    large, small = sorted(matrix_shape(shape), reverse=True)
    sizes = {"ranks": (2, 3), "columns": (3, small), "b": (large + 1, 4, 2), "a": (2, 1, small + 1)}
    parts: dict[str, Any] = {name: torch.randn(size, generator=random) for name, size in sizes.items()}
    return parts | {"large": large, "turned": matrix_shape(shape)[0] < large, "scale": 0.5}


_MADE = low_rank.made_by(factors, lambda shapes, settings: shapes["ranks"][0] * shapes["ranks"][1])


@delta_kind(
    paper="arXiv:2502.00987",
    check=_check,
    example=_example,
    **{name: made for name, made in _MADE.items() if name != "factors"},  # the rank is full
)
def random_bases(p: RandomBases, tile: slice, base: Tensor | None) -> Tensor:
    """s sum_j B_j diag(l_j) A diag(g_j) of random bases: RandLoRA."""
    return low_rank.rows(p, tile, factors)
