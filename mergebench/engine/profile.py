"""Statistics of a merged chunk: how far the models moved, where they disagree, and what the method kept of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergebench.engine.context import Context
from mergebench.engine.method import Method, Tasks
from mergebench.engine.replay import replay
from mergebench.engine.statistics import Statistic


class Counts(NamedTuple):
    """Sums over elements, which add up from chunks to tensors and layers.

    squares: of each model's task vector. shared: elements that two models or more changed; conflicts: those of them
    where signs differ. merged: the square of the merged task vector. kept: of each model (see `kept`). The last two are
    zero if no method was replayed.
    """

    elements: float
    squares: tuple[float, ...]
    shared: float
    conflicts: float
    merged: float
    kept: tuple[float, ...]

    def __add__(self, other: Counts) -> Counts:  # type: ignore[override]
        return Counts(
            self.elements + other.elements,
            tuple(a + b for a, b in zip(self.squares, other.squares, strict=True)),
            self.shared + other.shared,
            self.conflicts + other.conflicts,
            self.merged + other.merged,
            tuple(a + b for a, b in zip(self.kept, other.kept, strict=True)),
        )

    def of(self, elements: int) -> Counts:
        """The estimate for `elements` elements, from this sample of them."""
        times = elements / self.elements if self.elements else 0.0
        return Counts(
            elements,
            tuple(times * square for square in self.squares),
            times * self.shared,
            times * self.conflicts,
            times * self.merged,
            tuple(times * count for count in self.kept),
        )


def counts(method: Method | None, tvs: Tensor, params: Any, ctx: Context, answers: Sequence[Any]) -> Counts:
    """The counts of one chunk of task vectors [models, elements]; without a method, only those that need none."""
    merged, remaining, squares = 0.0, (0,) * len(tvs), tuple(map(_square, tvs))
    if method is not None and any(squares):  # adapters leave whole tensors unchanged
        result = replay(method, tvs, params, ctx, answers)
        assert not isinstance(result, Statistic), "all answers are known"
        vector = result.vector if isinstance(result, Tasks) else result
        merged = _square(vector)
        remaining = kept(method, tvs, params, ctx, answers, result)
    conflicts, shared = sign_conflicts(tvs)
    return Counts(tvs.shape[1], squares, shared, conflicts, merged, remaining)


def _square(values: Tensor) -> float:
    return values.double().square_().sum().item()


def sign_conflicts(tvs: Tensor) -> tuple[int, int]:
    """(elements that some models raised and others lowered, elements that two models or more changed)."""
    changed = torch.zeros(tvs.shape[1], dtype=torch.int16)
    for row in tvs:
        changed += row != 0
    opposed = (tvs.amin(0) < 0) & (tvs.amax(0) > 0)
    return int(torch.count_nonzero(opposed)), int(torch.count_nonzero(changed > 1))


def kept(
    method: Method, tvs: Tensor, params: Any, ctx: Context, answers: Sequence[Any], result: Any
) -> tuple[int, ...]:
    """The number of elements of each model that the method's result keeps.

    An element of a model is kept if the merged value changes when the model's weight (for a method without weights: its
    values) is halved, with the method's thresholds and sums unchanged. For a method with a model per task, an element
    is kept if the task's mask has it. `normalize` is off here, because a mean of equal values does not change with a
    weight.
    """
    if getattr(params, "normalize", False):
        params = dataclasses.replace(params, normalize=False)
        result = replay(method, tvs, params, ctx, answers)
    if isinstance(result, Tasks):
        return tuple(int(torch.count_nonzero(mask)) for mask in result.masks)
    found = []
    for number, row in enumerate(tvs):
        less, values = params, tvs
        if "weight" in method.parameters:
            weight = params.weight
            less = dataclasses.replace(params, weight=(*weight[:number], weight[number] / 2, *weight[number + 1 :]))
        else:
            values = tvs.clone()
            values[number] = row / 2
        found.append(int(torch.count_nonzero(replay(method, values, less, ctx, answers) != result)))
    return tuple(found)
