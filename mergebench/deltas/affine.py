"""GLoRA (arXiv:2306.07967): a weight, or a bias, times one matrix plus another.

    W' = W + W * A + B,   b' = b + b * D + E + W C        (* element by element)

A and B are products [rows, r] [r, columns], vectors [rows, 1] or numbers; this file has the weight's part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import matrix_shape
from mergebench.checkpoint.kind import Misfit, delta_kind


@dataclass(frozen=True)
class Affine:
    """A and B: [rows, r] with [r, columns], [rows, 1], [1], or none."""

    times: Tensor | None = None
    times_in: Tensor | None = None
    plus: Tensor | None = None
    plus_in: Tensor | None = None


def _value(out: Tensor | None, inner: Tensor | None, tile: slice) -> Tensor | float:
    """A tile of A or B."""
    if out is None:
        return 0.0
    rows = out if out.dim() == 1 else out[tile]
    return rows if inner is None else rows @ inner


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    rows, columns = matrix_shape(shape)
    for name in ("times", "plus"):
        out, inner = shapes.get(name), shapes.get(f"{name}_in")
        if inner is None and out in (None, (1,), (rows, 1)):
            continue
        if out is None or inner is None or len(out) != 2 or len(inner) != 2 or out[1] != inner[0]:
            raise ValueError(f"'{name}' is {list(out or ())} by {list(inner or ())}")
        if (out[0], inner[1]) != (rows, columns):
            raise Misfit(f"'{name}' makes {[out[0], inner[1]]}")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    if rows == 1:
        return {"times": torch.randn(1, generator=random), "plus": torch.randn(1, generator=random)}
    if rows == 31:
        return {"times": torch.randn(rows, 1, generator=random), "plus": torch.randn(rows, 1, generator=random)}
    out, inner = torch.randn(2, rows, 3, generator=random), torch.randn(2, 3, columns, generator=random)
    return {"times": out[0], "times_in": inner[0], "plus": out[1], "plus_in": inner[1]}


@delta_kind(paper="arXiv:2306.07967", needs_base=True, check=_check, example=_example)
def affine(p: Affine, tile: slice, base: Tensor | None) -> Tensor:
    """W * A + B: GLoRA."""
    assert base is not None
    return base * _value(p.times, p.times_in, tile) + _value(p.plus, p.plus_in, tile)
