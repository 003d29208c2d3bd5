"""Vectors of some neurons that replace the base's: the originals of edited rows, or trained token embeddings.

`row_patch` describes the layout and numbering of neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.kind import delta_kind
from mergebench.checkpoint.parts import Indices
from mergebench.deltas.row_patch import check_rows, check_vectors, neurons_in, some_rows


@dataclass(frozen=True)
class Replaced:
    """values [k, width], rows int64 [k] ascending."""

    values: Tensor
    rows: Indices
    columns: int = 0  # 0: neurons are rows; else neurons are columns, and this is their number per expert


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    if len(shapes["values"]) != 2 or shapes["rows"] != shapes["values"][:1]:
        raise ValueError(f"rows {list(shapes['rows'])} and vectors {list(shapes['values'])}")
    check_vectors(shapes["values"], settings["columns"], shape)


def _folds(p: Replaced, tile: slice, base: Tensor) -> Tensor:
    """W + (V - W) is not V in float32."""
    for chosen, coordinates, where in neurons_in(tile, p.rows, p.values.shape[1], p.columns):
        vectors = p.values[chosen, coordinates]
        base[where] = vectors.T if p.columns else vectors
    return base


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, width, columns = some_rows(shape)
    return {"values": torch.randn(len(rows), width, generator=random), "rows": rows, "columns": columns}


@delta_kind(
    paper="arXiv:2407.08770",
    needs_base=True,
    folds=_folds,
    check=_check,
    validate=lambda p, shape: check_rows(p.rows, p.values.shape[1], shape),
    example=_example,
    label=lambda parts, settings: f"{parts['rows'].numel} neurons",
)
def replaced_rows(p: Replaced, tile: slice, base: Tensor | None) -> Tensor:
    """V - W for the neurons that are replaced, else nothing."""
    assert base is not None
    out = torch.full_like(base, -0.0)  # adding it changes no bit
    for chosen, coordinates, where in neurons_in(tile, p.rows, p.values.shape[1], p.columns):
        vectors = p.values[chosen, coordinates]
        out[where] = (vectors.T if p.columns else vectors) - base[where]
    return out
