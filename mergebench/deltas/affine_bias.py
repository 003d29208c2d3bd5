"""GLoRA's change to a bias (arXiv:2306.07967), which depends on the weight beside it.

    b' = b + b * D + E + W C

D and E are vectors or numbers, C [in, 1] is a vector or a product [in, r] [r, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import Source, matrix_shape
from mergebench.checkpoint.kind import Misfit, delta_kind


@dataclass(frozen=True)
class AffineBias:
    """D and E [out] or [1]; W [out, in], C [in, 1], or [in, r] with [r, 1]."""

    times: Tensor | None = None
    plus: Tensor | None = None
    weight: Tensor | None = None
    mixed: Tensor | None = None
    mixed_in: Tensor | None = None
    product: Tensor | None = None  # W C [out]; computed, not stored


def _product(p: AffineBias) -> Tensor | float:
    if p.weight is None or p.mixed is None:
        return 0.0
    return (p.weight @ (p.mixed if p.mixed_in is None else p.mixed @ p.mixed_in))[:, 0]


def _prepare(p: AffineBias, base: Source, shape: tuple[int, ...]) -> AffineBias:
    """W is dropped after the product."""
    product = _product(p)
    return AffineBias(p.times, p.plus, product=product if isinstance(product, Tensor) else None)


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    out = matrix_shape(shape)[1]
    for name in ("times", "plus"):
        if shapes.get(name, (1,)) not in ((1,), (out,)):
            raise Misfit(f"'{name}' is {list(shapes[name])}")
    weight, mixed, inner = shapes.get("weight"), shapes.get("mixed"), shapes.get("mixed_in")
    if weight is None and mixed is None and inner is None:
        return
    if weight is None or mixed is None or len(mixed) != 2 or (mixed[1:] if inner is None else inner[1:]) != (1,):
        raise ValueError(f"C is {list(mixed or ())} by {list(inner or ())}, with a weight {list(weight or ())}")
    if weight != (out, mixed[0]) or (inner is not None and inner[0] != mixed[1]):
        raise Misfit(f"C is {list(mixed)} by {list(inner or ())}, the weight {list(weight)}")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any] | None:
    rows, out = matrix_shape(shape)
    if rows != 1:
        return None
    parts = {"times": torch.randn(out, generator=random), "plus": torch.randn(1, generator=random)}
    parts |= {"weight": torch.randn(out, 5, generator=random), "mixed": torch.randn(5, 2, generator=random)}
    return parts | {"mixed_in": torch.randn(2, 1, generator=random)}


@delta_kind(paper="arXiv:2306.07967", needs_base=True, prepare=_prepare, check=_check, example=_example)
def affine_bias(p: AffineBias, tile: slice, base: Tensor | None) -> Tensor:
    """b * D + E + W C: GLoRA on a bias."""
    assert base is not None
    product = _product(p) if p.product is None else p.product
    added = (0.0 if p.plus is None else p.plus) + product
    return (0 * base if p.times is None else base * p.times) + added
