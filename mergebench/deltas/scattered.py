"""Single elements that change, with a low-rank matrix beside them or without: SHiRA (arXiv:2406.13175), Super-Tuning
(arXiv:2607.09287).

    W' = W + S + s B A        (S: zeros, and values[i] at the i-th position)

Super-Tuning with factors is its paper's Supra.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import matrix_shape
from mergebench.checkpoint.kind import Misfit, delta_kind
from mergebench.checkpoint.parts import Indices
from mergebench.deltas import low_rank


@dataclass(frozen=True)
class Scattered:
    """values [k]; indices [k] into the flat tensor, or [2, k], rows and columns; B [rows, r], A [r, columns]."""

    values: Tensor
    indices: Indices
    b: Tensor | None = None
    a: Tensor | None = None
    scale: float = 1.0
    columns: int = 0  # of the tensor; computed, not stored


def _ascending(p: Scattered, shape: tuple[int, ...]) -> Scattered:
    """The same with flat indices in ascending order; raises as `check` does if one is twice or outside the tensor."""
    rows, columns = matrix_shape(shape)
    flat = p.indices
    if flat.dim() == 2:
        if len(flat.T) and (int(flat[1].min()) < 0 or int(flat[1].max()) >= columns):
            raise Misfit(f"it changes elements of another tensor than one of {columns} columns")
        flat = flat[0] * columns + flat[1]
    flat, order = flat.sort()
    if len(flat) and (int(flat[0]) < 0 or int(flat[-1]) >= rows * columns):
        raise Misfit(f"it changes elements of another tensor than {list(shape)}")
    if bool((flat.diff() == 0).any()):
        raise ValueError("it changes an element twice")
    return replace(p, values=p.values[order], indices=flat, columns=columns)


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    values, indices = shapes["values"], shapes["indices"]
    if len(values) != 1 or indices not in (values, (2, *values)):
        raise ValueError(f"values {list(values)} and indices {list(indices)}")
    if ("a" in shapes) != ("b" in shapes):
        raise ValueError("only one factor of two")
    if "a" in shapes:
        low_rank.check(shapes, settings, shape)


def _validate(p: Scattered, shape: tuple[int, ...]) -> None:
    _ascending(p, shape)


def _energy(p: Scattered, shape: tuple[int, ...]) -> float:
    """|S|^2 + 2 <S, s B A> + |s B A|^2, in float64."""
    p = _ascending(p, shape)
    values = p.values.double()
    squares = float(values.square().sum())
    if p.b is None or p.a is None:
        return squares
    at = p.scale * (p.b[p.indices // p.columns].double() * p.a.T[p.indices % p.columns].double()).sum(1)
    return max(
        squares + 2 * float(values @ at) + low_rank.energy(low_rank.Factors(p.b, p.a, None, p.scale), shape), 0.0
    )


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    """Some elements in any order; of a vector by flat indices and with factors, else by int32 rows and columns."""
    rows, columns = matrix_shape(shape)
    flat = torch.randperm(math.prod(shape), generator=random)[: math.prod(shape) // 3 + 1]
    pairs = torch.stack([flat // columns, flat % columns]).int()
    parts: dict[str, Any] = {"values": torch.randn(len(flat), generator=random), "indices": pairs if rows > 1 else flat}
    return parts | (low_rank.some_factors(shape, random) if columns > 1 else {})


def _made(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    """The order of the positions, and the sorted positions and values."""
    return 36 * math.prod(shapes["values"])


@delta_kind(
    paper="arXiv:2607.09287",
    prepare=lambda p, base, shape: _ascending(p, shape),
    energy=_energy,
    made=_made,
    check=_check,
    validate=_validate,
    example=_example,
    label=lambda parts, settings: (
        f"{parts['values'].numel} values" + (", rank " + str(min(parts["b"].shape)) if "b" in parts else "")
    ),
)
def scattered(p: Scattered, tile: slice, base: Tensor | None) -> Tensor:
    """S + s B A: SHiRA, Super-Tuning."""
    first, stop = tile.start * p.columns, tile.stop * p.columns
    low, high = torch.searchsorted(p.indices, torch.tensor([first, stop], device=p.indices.device)).tolist()
    if p.b is None or p.a is None:  # adding -0.0 changes no bit
        out = torch.full((stop - first,), -0.0, dtype=p.values.dtype, device=p.values.device)
    else:
        out = (p.scale * p.b[tile] @ p.a).view(-1)
    return out.index_add(0, p.indices[low:high] - first, p.values[low:high]).view(-1, p.columns)
