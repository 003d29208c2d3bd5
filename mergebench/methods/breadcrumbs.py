"""Model Breadcrumbs: drop the largest and the smallest, then task arithmetic."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

from mergebench.engine.chunks import column, total, trim
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, Tensor, merge_method
from mergebench.engine.statistics import Statistic, order_statistics
from mergebench.methods.linear import normalized
from mergebench.parameters import PerModel, param


@dataclass(frozen=True)
class Params:
    density: PerModel = param(1.0, "share of elements kept", above=0, high=1, per_model=True)
    gamma: PerModel = param(0.01, "share of elements dropped from the top", low=0, high=1, per_model=True)
    weight: PerModel = param(1.0, "weight of the model", per_model=True)
    lambda_: float = param(1.0, "factor on the merged task vector")
    normalize: bool = param(False, "divide by the sum of the weights")


@merge_method(takes="task_vectors", keeps_base=True, paper="arXiv:2312.06795")
def breadcrumbs(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Drop the largest elements, then the smallest until `density` is kept; add up the rest.

        theta = theta_0 + lambda sum w_i m_i tau_i
        m_i = (|tau_i| is among the `density` largest after the `gamma` largest)

    Davari and Belilovsky, "Model Breadcrumbs". Counts are mergekit's: of d elements, int(gamma d) at the
    top go, fewer where density + gamma is above 1; int(density d) are kept, and whatever equals the first
    or the last of them. A density of 1 keeps all, whatever gamma.
    """
    tvs = yield from between_outliers_and_noise(tvs, p, ctx)
    weights = normalized(p.weight) if p.normalize else p.weight
    return total(tvs, weights) * p.lambda_


def between_outliers_and_noise(tvs: Tensor, p: Params, ctx: Context) -> Generator[Statistic, Any, Tensor]:
    """The task vectors without their largest and their smallest elements (section 3)."""
    if min(p.density) == 1:
        return tvs
    d = ctx.numel
    kept = [int(density * d) for density in p.density]
    tops = [int(gamma * d) for gamma in p.gamma]
    first = [max(d - count - top, 0) for count, top in zip(kept, tops, strict=True)]
    last = [place + count - 1 for place, count in zip(first, kept, strict=True)]
    ranks = [[min(place, d - 1) for place in first], [max(place, 0) for place in last]]
    low, high = yield order_statistics(tvs, ranks, key=torch.abs, trim=True)
    low = low + column(low, [0.0 if count else math.inf for count in kept])  # a small tensor may keep none
    return trim(tvs, low, high)
