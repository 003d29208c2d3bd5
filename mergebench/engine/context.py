"""What a method may know about its chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from mergebench.engine.noise import bernoulli
from mergebench.engine.span import Span
from mergebench.errors import MergebenchError, RunError

if TYPE_CHECKING:  # listing the methods must not wait for torch
    from torch import Tensor


class OnData(NamedTuple):
    """What the models did on data, for the chunk: the statistics that a method declares.

    values: of kind fisher and coefficients [models, elements], of kind gram [models, inputs, inputs]. norms: of each
    model's statistics as a whole. inputs_first: the weight is stored as [inputs, outputs].
    """

    values: Tensor
    norms: tuple[float, ...]
    inputs_first: bool = False


@dataclass(frozen=True)
class Context:
    """The context of a chunk.

    numel: elements that the statistics cover (of the tensor, or of the whole model), the papers' d. models: the models'
    names, in recipe order: the rows of the chunk. spans: which elements the chunk's columns are. shape: the tensor's,
    for methods cut by row or tensor. on_data: the models' statistics; None for a tensor without any.
    """

    numel: int
    models: tuple[str, ...]
    spans: tuple[Span, ...]
    shape: tuple[int, ...]
    scope: str
    seed: int
    device: torch.device
    on_data: OnData | None = None

    def bernoulli(self, shares: Sequence[float] | Tensor) -> Tensor:
        """Random bool [models, elements], true with probability `shares[i]` for model i, or each element's own.

        The draw of an element depends on (seed, model, tensor, element) alone, so chunks, threads,
        devices and replays cannot change it.
        """
        return bernoulli(self.seed, self.spans, shares, self.device)

    def refuse(self, model: int, why: str, hint: str | None = None) -> MergebenchError:
        """The error to raise if a model cannot be merged; it names the model (and the tensor)."""
        where = f"{self.models[model]}" if self.scope == "model" else f"{self.models[model]}: {self.spans[0].tensor}"
        return RunError(f"{where}: {why}", hint)
