"""TIES-Merging: trim, elect sign, disjoint merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergebench.engine.chunks import column, plus_or_minus, times, total, trim, weighted
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, Tensor, merge_method
from mergebench.engine.statistics import order_statistics
from mergebench.parameters import PerModel, param


@dataclass(frozen=True)
class Params:
    density: PerModel = param(1.0, "share of elements kept", above=0, high=1, per_model=True)
    weight: PerModel = param(1.0, "weight of the model", per_model=True)
    lambda_: float = param(1.0, "factor on the merged task vector")
    normalize: bool = param(True, "divide by the sum of the weights that agree")


@merge_method(takes="task_vectors", keeps_base=True, paper="arXiv:2306.01708")
def ties(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Keep the largest elements, elect a sign for each, average those that agree with it.

        tau_i' = tau_i where |tau_i| is among the `density` largest, else 0;
        s = sign(sum w_i tau_i')
        theta = theta_0 + lambda sum w_i m_i tau_i' / sum w_i m_i,
        m_i = (sign tau_i' = s)

    Yadav et al., "TIES-Merging". Trimming keeps every element at or above the threshold, as the authors'
    code does, so ties keep more than `density`. An even vote elects plus. The default density of 1 trims
    nothing, as in mergekit; the paper keeps 0.2.
    """
    # trim
    if min(p.density) < 1:
        kept = [max(int(ctx.numel * density), 1) for density in p.density]
        (threshold,) = yield order_statistics(tvs, [[ctx.numel - k for k in kept]], key=torch.abs, trim=True)
        tvs = trim(tvs, nothing_kept(threshold, p.density))
    return times(elect_and_merge(tvs, p.weight, p.normalize), p.lambda_)


def nothing_kept(threshold: Tensor, density: Sequence[float]) -> Tensor:
    """The thresholds; infinite where a gradient's density is zero."""
    if min(density) > 0:
        return threshold
    return threshold.masked_fill(column(threshold, density) == 0, math.inf)


def elect_and_merge(tvs: Tensor, weights: Sequence[float], normalize: bool) -> Tensor:
    """Elect each element's sign by mass, then combine the task vectors of that sign (sections 3.2, 3.3)."""
    tvs = weighted(tvs, weights)
    return merge_agreeing(tvs, plus_or_minus(total(tvs)), weights, normalize)  # an even vote elects plus


def merge_agreeing(tvs: Tensor, elected: Tensor, weights: Sequence[float], normalize: bool) -> Tensor:
    """The weighted sum of the task vectors with the elected sign, by default divided by the sum of their weights."""
    # along the elected sign, the values that agree are those above zero
    agreeing = (tvs * elected).relu_()
    merged = total(agreeing).mul_(elected)
    if not normalize:
        return merged
    mass = total(agreeing.sign_(), weights)
    if min(weights) >= torch.finfo(torch.float32).tiny:
        return merged.div_(mass.clamp_(min=min(weights)))  # where nothing agrees, 0 by any number
    return merged.div_(mass.masked_fill_(mass == 0, 1))
