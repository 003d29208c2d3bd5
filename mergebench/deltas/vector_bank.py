"""VB-LoRA (arXiv:2405.15179): both factors in pieces that are mixtures of a few vectors of one bank.

    W' = W + B A;  a piece of B or A is sum_i w_i bank[c_i]

bank [h, length]; of each piece's logits [h] the largest `topk` are chosen, and w is their softmax. Stored are the
logits, of A [r, in / length, h] and of B [out / length, r, h], or what was chosen: all c [..., topk], and the w but the
last one, [..., topk - 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import matrix_shape
from mergebench.checkpoint.kind import Misfit, delta_kind
from mergebench.checkpoint.parts import Indices
from mergebench.deltas import low_rank


@dataclass(frozen=True)
class VectorBank:
    """The bank, and the logits of both factors, or the chosen vectors of both and their weights."""

    bank: Tensor
    topk: int
    logits_b: Tensor | None = None
    logits_a: Tensor | None = None
    chosen_b: Indices | None = None
    chosen_a: Indices | None = None
    weights_b: Tensor | None = None
    weights_a: Tensor | None = None
    columns: bool = False  # outputs are columns of the stored tensor


def factors(p: VectorBank) -> tuple[Tensor, Tensor]:
    """B and A, put together of their pieces."""
    pieces_b = _pieces(p, p.logits_b, p.chosen_b, p.weights_b)  # [out / length, r, length]
    pieces_a = _pieces(p, p.logits_a, p.chosen_a, p.weights_a)  # [r, in / length, length]
    b, a = pieces_b.mT.flatten(0, 1), pieces_a.flatten(1)
    return (a.T, b.T) if p.columns else (b, a)


def _pieces(p: VectorBank, logits: Tensor | None, chosen: Tensor | None, weights: Tensor | None) -> Tensor:
    if logits is not None:
        largest, chosen = logits.topk(p.topk, dim=-1)
        weights = largest.softmax(-1)
    else:
        assert weights is not None and chosen is not None
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
    return (weights[..., None] * p.bank[chosen]).sum(-2)


def _pieces_shape(shapes: Mapping[str, tuple[int, ...]], factor: str) -> tuple[int, ...]:
    """[pieces, r] of B, [r, pieces] of A."""
    stored = shapes.get(f"logits_{factor}", shapes.get(f"chosen_{factor}", ()))
    return stored[:-1]


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    bank, topk = shapes["bank"], settings["topk"]
    b, a = _pieces_shape(shapes, "b"), _pieces_shape(shapes, "a")
    if len(bank) != 2 or len(b) != 2 or len(a) != 2 or b[1] != a[0] or not 0 < topk <= bank[0]:
        raise ValueError(f"pieces {list(b)} and {list(a)} of a bank {list(bank)} make no factors")
    for factor, pieces in (("b", b), ("a", a)):
        logits = shapes.get(f"logits_{factor}", (*pieces, bank[0]))
        chosen = shapes.get(f"chosen_{factor}", (*pieces, topk))
        weights = shapes.get(f"weights_{factor}", (*pieces, topk - 1))
        halves = {f"chosen_{factor}" in shapes, f"weights_{factor}" in shapes, f"logits_{factor}" not in shapes}
        if len(halves) != 1 or (logits, chosen, weights) != ((*pieces, bank[0]), (*pieces, topk), (*pieces, topk - 1)):
            raise ValueError(f"logits or chosen vectors of {factor.upper()} do not fit {topk} of a bank {list(bank)}")
    out, inner = matrix_shape(shape)[:: -1 if settings["columns"] else 1]
    if (b[0] * bank[1], a[1] * bank[1]) != (out, inner):
        raise Misfit(f"the factors make {[b[0] * bank[1], a[1] * bank[1]]}")


def _validate(p: Any, shape: tuple[int, ...]) -> None:
    for chosen in (p.chosen_b, p.chosen_a):
        if chosen is not None and chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(p.bank):
            raise ValueError(f"a vector is chosen that the bank of {len(p.bank)} does not have")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    turned = columns == 1
    out, inner = (columns, rows) if turned else (rows, columns)
    parts: dict[str, Any] = {"bank": torch.randn(7, 1, generator=random), "topk": 2, "columns": turned}
    if rows == 1:
        logits = {"logits_b": (out, 3, 7), "logits_a": (3, inner, 7)}
        return parts | {name: torch.randn(size, generator=random) for name, size in logits.items()}
    for factor, size in (("b", (out, 3)), ("a", (3, inner))):
        parts[f"chosen_{factor}"] = torch.randint(7, (*size, 2), generator=random)
        parts[f"weights_{factor}"] = torch.rand((*size, 1), generator=random)
    return parts


_MADE = low_rank.made_by(factors, lambda shapes, settings: _pieces_shape(shapes, "a")[0])


def _made(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    """Both factors, and of one the vectors of all pieces before they are mixed."""
    length, most = shapes["bank"][1], max(math.prod(_pieces_shape(shapes, factor)) for factor in "ba")
    made = int(_MADE["made"](shapes, settings, shape))
    return made + 8 * int(settings["topk"]) * most * length


@delta_kind(
    paper="arXiv:2405.15179",
    check=_check,
    validate=_validate,
    example=_example,
    **_MADE | {"made": _made},
)
def vector_bank(p: VectorBank, tile: slice, base: Tensor | None) -> Tensor:
    """B A in pieces that are mixtures of a bank's vectors: VB-LoRA."""
    return low_rank.rows(p, tile, factors)
