"""IA3 (arXiv:2205.05638): the rows of a weight, or its columns, each times a number.

W' = l * W (rows: outputs), W' = W * l (columns: inputs)
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
class Scaled:
    """factors [rows], or with `columns` [columns], of the tensor as it is stored."""

    factors: Tensor
    columns: bool = False


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    if shapes["factors"] != (matrix_shape(shape)[1 if settings["columns"] else 0],):
        raise Misfit(f"{list(shapes['factors'])} factors of {'columns' if settings['columns'] else 'rows'}")


def _factors(p: Scaled, tile: slice) -> Tensor:
    return p.factors if p.columns else p.factors[tile, None]


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    columns = shape[0] > shape[1]
    return {"factors": torch.randn(shape[1 if columns else 0], generator=random), "columns": columns}


@delta_kind(
    paper="arXiv:2205.05638",
    needs_base=True,
    folds=lambda p, tile, base: base.mul_(_factors(p, tile)),
    check=_check,
    example=_example,
)
def scaled(p: Scaled, tile: slice, base: Tensor | None) -> Tensor:
    """(l - 1) * W by rows or columns: IA3."""
    assert base is not None
    return (_factors(p, tile) - 1) * base
