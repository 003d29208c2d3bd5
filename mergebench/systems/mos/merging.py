"""Merge an adapter toward the earlier adapters, during training and during use.

`paper` is MOS (arXiv:2412.09441, adapter merging): after every step A <- (1 - alpha) A + alpha M, with M the mean of
the earlier tasks' adapters, for weights and biases; the first task is not merged.

`reference` is the published code, which merges in place in every forward pass, once for each of the L blocks. Block l
(from 1) of a pass computes with an adapter merged l times; after the pass the adapter has been merged L times, and
after the step once more. The published code also does so in evaluation, with the stored adapters. m merges with a fixed
mean give A + (1 - (1 - alpha)^m) (M - A), so the number of forward passes determines how evaluation changes a stored
adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mergebench.networks.bottleneck import Adapter


class Merging(Protocol):
    """How an adapter is merged while it is trained."""

    def forward(self, adapter: Adapter) -> Adapter:
        """The tensors that this forward pass computes with; the loss's gradient at them is the adapter's."""

    def step(self, adapter: Adapter) -> None:
        """The merge that follows the optimiser's step, in place."""


def merging_of(semantics: str, mean: Adapter | None, alpha: float, blocks: Sequence[str]) -> Merging:
    """semantics: paper or reference. mean: of the adapters before, None for the first. blocks: in order of depth."""
    if mean is None:
        return Alone()
    return Paper(mean, alpha) if semantics == "paper" else Reference(mean, alpha, blocks)


class Alone:
    """The first task's: there is nothing to merge it with."""

    def forward(self, adapter: Adapter) -> Adapter:
        return adapter

    def step(self, adapter: Adapter) -> None:
        pass


@dataclass(frozen=True)
class Paper:
    """One merge a step."""

    mean: Adapter
    alpha: float

    def forward(self, adapter: Adapter) -> Adapter:
        return adapter

    def step(self, adapter: Adapter) -> None:
        _merge(adapter, self.mean, self.alpha, 1)


@dataclass(frozen=True)
class Reference:
    """One merge a block of every forward pass, seen by the blocks from there on, and one a step.

    A pass without gradients merges all the same: in the published code the passes that gather a task's class
    statistics go on merging the adapter that the next task starts from, though not the copy already stored.
    """

    mean: Adapter
    alpha: float
    blocks: Sequence[str]

    def forward(self, adapter: Adapter) -> Adapter:
        used = in_pass(adapter, self.mean, self.alpha, self.blocks, 0)
        _merge(adapter, self.mean, self.alpha, len(self.blocks))
        return used

    def step(self, adapter: Adapter) -> None:
        _merge(adapter, self.mean, self.alpha, 1)


def in_pass(adapter: Adapter, mean: Adapter, alpha: float, blocks: Sequence[str], before: int) -> dict[str, Tensor]:
    """What the published code's next forward pass computes with, `before` passes after the adapter was stored."""
    merges = {block: len(blocks) * before + number for number, block in enumerate(blocks, 1)}
    with torch.no_grad():
        return {
            name: tensor.lerp(mean[name].to(tensor.device), share(alpha, merges[name.rsplit(".", 2)[0]]))
            for name, tensor in adapter.items()
        }


def share(alpha: float, merges: int) -> float:
    """The share of the distance to the mean that an adapter has moved after `merges` merges: 1 - (1 - alpha)^merges."""
    return float(1 - (1 - alpha) ** merges)


def mean_of(adapters: Sequence[Adapter]) -> dict[str, Tensor] | None:
    """The mean of a task's predecessors, tensor by tensor; None where it has none."""
    if not adapters:
        return None
    first, *others = adapters
    return {name: sum((one[name] for one in others), tensor) / len(adapters) for name, tensor in first.items()}


def _merge(adapter: Adapter, mean: Adapter, alpha: float, merges: int) -> None:
    with torch.no_grad():
        for name, tensor in adapter.items():
            tensor.lerp_(mean[name].to(tensor.device), share(alpha, merges))
