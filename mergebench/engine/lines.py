"""LiNeS: scale the merged task vector by the depth of each layer, after any method that gives one."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.engine.chunks import times, total
from mergebench.engine.context import Context
from mergebench.engine.method import Method
from mergebench.engine.statistics import norms


@dataclass(frozen=True)
class Lines:
    """tau of layer l of L becomes (alpha + beta l / (L - 1)) tau; outside the layers, alpha tau.

    Wang et al., "LiNeS: Post-training layer scaling" (arXiv:2410.17146). The default alpha is the paper's for several
    tasks: |sum tau_i| / (N |tau|), in the L1 norm (as in the authors' code) over all merged tensors. tau is the
    method's result, with its weights and lambda; the sum has none.
    """

    alpha: float | None
    beta: float
    depth: Mapping[str, float]  # l / (L - 1) by tensor, for those in layers

    def around(self, method: Method) -> Method:
        """The method with its result scaled."""
        return dataclasses.replace(method, function=_Scaled(self, method))

    def factor(self, alpha: float, tensor: str) -> float:
        return alpha + self.beta * self.depth.get(tensor, 0.0)


@dataclass(frozen=True)
class _Scaled:
    """A method's function with its result scaled."""

    lines: Lines
    method: Method

    def __call__(self, tvs: Tensor, p: Any, ctx: Context) -> Any:
        merged = self.method(tvs, p, ctx)
        if inspect.isgenerator(merged):
            merged = yield from merged
        alpha = self.lines.alpha
        if alpha is None:
            alpha = alpha_of((yield norms(torch.stack([total(tvs), merged]))), len(tvs))
        cut = torch.split(merged, [span.numel for span in ctx.spans])
        parts = [times(part, self.lines.factor(alpha, span.tensor)) for part, span in zip(cut, ctx.spans, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def alpha_of(lengths: Tensor, models: int) -> float:
    """The paper's alpha from the L1 norms of the sum of the task vectors and of the merged one (if zero: 1)."""
    summed, merged = lengths.tolist()
    return summed / (models * merged) if merged else 1.0
