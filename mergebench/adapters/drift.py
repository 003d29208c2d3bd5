"""Measure how far the adapters of a sequence lie apart: from the mean of the earlier adapters, and by angles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench.adapters.stored import check_alike, read_stored, together
from mergebench.checkpoint.files import Files
from mergebench.checkpoint.reference import reference_of
from mergebench.engine.machine import keep_freed_memory, one_thread
from mergebench.errors import RecipeError


@dataclass(frozen=True)
class Apart:
    """For a group of tensors of n adapters: dot products `dots` [n, n], and `moved` [n], the squared distances to the
    mean of the earlier adapters (none for the first); float64."""

    dots: Tensor
    moved: Tensor

    def __add__(self, other: Apart) -> Apart:
        return Apart(self.dots + other.dots, self.moved + other.moved)

    @property
    def norms(self) -> list[float]:
        return self.dots.diagonal().sqrt().tolist()

    @property
    def drift(self) -> list[float | None]:
        """|A_b - mean of A_1 .. A_b-1| / |A_b|; None for the first adapter, and for an adapter of zeros."""
        lengths = zip(self.moved.sqrt().tolist(), self.norms, strict=True)
        return [distance / norm if at and norm else None for at, (distance, norm) in enumerate(lengths)]

    @property
    def cosines(self) -> list[list[float | None]]:
        """Cosines between all pairs; None if an adapter is zero."""
        norms = self.norms
        return [
            [dot / (a * b) if a and b else None for dot, b in zip(row, norms, strict=True)]
            for row, a in zip(self.dots.tolist(), norms, strict=True)
        ]

    def to_plain(self) -> dict[str, Any]:
        return {"norms": self.norms, "drift": self.drift, "cosines": self.cosines}


@dataclass(frozen=True)
class Drift:
    """A sequence of adapters, compared on their stored tensors."""

    names: list[str]
    kind: str
    total: Apart
    layers: dict[str, Apart]  # by depth; tensors outside the layers come last
    tensors: int


def adapter_drift(adapters: Sequence[str | Path]) -> Drift:
    """Compare the adapters of a sequence, two or more, in the order of their tasks.

    Raises `RecipeError` for fewer than two, `ModelError` if they do not fit together, `RunError` if an adapter is
    damaged or not finite.
    """
    if len(adapters) < 2:
        raise RecipeError("drift compares the adapters of a sequence", "name two or more")
    read = [read_stored(adapter) for adapter in adapters]
    check_alike(read)
    layers = {}
    keep_freed_memory()
    with Files() as files, torch.inference_mode(), one_thread():  # the dot products are short
        for layer, names in read[0].layers.items():
            layers[layer] = sum((_apart(rows) for name in names for _, rows in together(files, read, name)), _NONE)
    names = [adapter.name for adapter in read]
    if len(set(names)) < len(names):
        names = [reference_of(adapter.path) for adapter in read]
    return Drift(names, read[0].kind, sum(layers.values(), _NONE), layers, sum(map(len, read[0].layers.values())))


_NONE = Apart(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))


def _apart(rows: Sequence[Tensor]) -> Apart:
    values = torch.stack(list(rows)).double()
    moved, total = torch.zeros(len(values), dtype=torch.float64), values[0].clone()
    for at, value in enumerate(values[1:], 1):
        distance = total.div(at).sub_(value)
        moved[at] = distance.dot(distance)
        total += value
    return Apart(values @ values.T, moved)
