"""A full difference, or a tensor that replaces the base's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.kind import Misfit, StoredAs, delta_kind
from mergebench.checkpoint.parts import Rows


@dataclass(frozen=True)
class Dense:
    """values of the tensor's shape: (W' - W) / scale, or with `replace` W' itself."""

    values: Rows
    scale: float = 1.0
    replace: bool = False


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    if shapes["values"] != shape:
        raise Misfit(f"values {list(shapes['values'])}")


def _folds(p: Dense, tile: slice, base: Tensor) -> Tensor:
    """W + (S - W) is not S in float32."""
    return p.values[tile] if p.replace else base + dense(p, tile, None)


def _stored_as(settings: Mapping[str, Any]) -> StoredAs:
    return "replacement" if settings["replace"] else "difference" if settings["scale"] == 1 else None


@delta_kind(
    paper="arXiv:2212.04089",
    needs_base=lambda settings: settings["replace"],
    folds=_folds,
    check=_check,
    example=lambda shape, random: {"values": torch.randn(shape, generator=random), "replace": shape[0] == 1},
    stored_as=_stored_as,
    label=lambda parts, settings: "whole" if settings["replace"] else "",
)
def dense(p: Dense, tile: slice, base: Tensor | None) -> Tensor:
    """A task vector, a bias's difference, or a tensor that an adapter saves whole."""
    values = p.values[tile]
    if p.replace:
        assert base is not None
        return values - base
    return values if p.scale == 1 else p.scale * values
