"""Vectors of some neurons that replace the base's: the originals of edited rows, or trained token embeddings.

`row_patch` describes the layout and numbering of neurons.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import Source
from mergebench.checkpoint.kind import Misfit, delta_kind
from mergebench.checkpoint.parts import Indices
from mergebench.deltas.row_patch import check_rows, check_vectors, neurons_in, some_rows


@dataclass(frozen=True)
class Replaced:
    """values [k, width], rows int64 [k] ascending, or their numbers as a setting, in any order."""

    values: Tensor
    rows: Indices | None = None
    columns: int = 0  # 0: neurons are rows; else neurons are columns, and this is their number per expert
    tokens: tuple[int, ...] = ()  # numbers of the rows, if no part holds them


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    tokens = settings["tokens"]
    if ("rows" in shapes) == bool(tokens):
        raise ValueError("the numbers of the rows are missing, or there twice")
    rows = shapes.get("rows", (len(tokens),))
    if len(shapes["values"]) != 2 or rows != shapes["values"][:1]:
        raise ValueError(f"rows {list(rows)} and vectors {list(shapes['values'])}")
    check_vectors(shapes["values"], settings["columns"], shape)
    if tokens and len(set(tokens)) < len(tokens):
        raise ValueError("it replaces a row twice")
    if tokens and (min(tokens) < 0 or max(tokens) >= math.prod(shape) // shapes["values"][1]):
        raise Misfit(f"it replaces rows {min(tokens)} to {max(tokens)}")


def _ascending(p: Replaced, base: Source, shape: tuple[int, ...]) -> Replaced:
    """The same with the rows in ascending order."""
    if p.rows is not None:
        return p
    rows, order = torch.tensor(p.tokens, device=p.values.device).sort()
    return replace(p, values=p.values[order], rows=rows)


def _changed(p: Replaced, tile: slice) -> Iterator[tuple[tuple[slice | Tensor, ...], Tensor]]:
    """For the neurons in a tile: index into the tile, and their values."""
    assert p.rows is not None
    for chosen, coordinates, where in neurons_in(tile, p.rows, p.values.shape[1], p.columns):
        vectors = p.values[chosen, coordinates]
        yield where, vectors.T if p.columns else vectors


def _validate(p: Replaced, shape: tuple[int, ...]) -> None:
    if p.rows is not None:
        check_rows(p.rows, p.values.shape[1], shape)


def _folds(p: Replaced, tile: slice, base: Tensor) -> Tensor:
    """W + (V - W) is not V in float32."""
    for where, vectors in _changed(p, tile):
        base[where] = vectors
    return base


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, width, columns = some_rows(shape)
    return {"values": torch.randn(len(rows), width, generator=random), "rows": rows, "columns": columns}


@delta_kind(
    paper="arXiv:2407.08770",
    needs_base=True,
    folds=_folds,
    prepare=_ascending,
    check=_check,
    validate=_validate,
    example=_example,
    label=lambda parts, settings: f"{parts['values'].shape[0]} neurons",
)
def replaced_rows(p: Replaced, tile: slice, base: Tensor | None) -> Tensor:
    """V - W for the neurons that are replaced, else nothing."""
    assert base is not None
    out = torch.full_like(base, -0.0)  # adding it changes no bit
    for where, vectors in _changed(p, tile):
        out[where] = vectors - base[where]
    return out
