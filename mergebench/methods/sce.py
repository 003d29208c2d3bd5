"""SCE: select, calculate, erase."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch

from mergebench.engine.chunks import plus_or_minus, total, trim, weighted
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, Tensor, merge_method
from mergebench.engine.statistics import gram, order_statistics
from mergebench.methods.ties import merge_agreeing
from mergebench.parameters import param


@dataclass(frozen=True)
class Params:
    select_topk: float = param(1.0, "share of the elements that differ between models kept", above=0, high=1)


@merge_method(takes="task_vectors", keeps_base=True, paper="arXiv:2408.07990")
def sce(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Select where models vary most, weigh each model by its mean square there, erase the minority signs.

        tau_i' = tau_i where its variance is among the `select_topk` largest, else 0
        w_i = |tau_i'|^2 / sum |tau_j'|^2; m_i = (sign tau_i' = sign sum tau_j')
        theta = theta_0 + sum w_i m_i tau_i' / sum w_i m_i

    Wan et al., "FuseChat". Of the elements whose variance over the models is not zero, `select_topk` are
    kept (with equal variances, more). Weights are shares of the squares, however small these are: mergekit
    takes equal weights where the mean squares add up to less than 1e-6.
    """
    if p.select_topk < 1:
        variance = spread(tvs)
        count = yield gram(variance.sign())
        kept = int(count.item() * p.select_topk)
        (threshold,) = yield order_statistics(variance, [ctx.numel - max(kept, 1)])
        threshold = threshold if kept else torch.full_like(threshold, math.inf)
        tvs = tvs * trim(variance, threshold).sign_()  # select
    squares = (yield gram(tvs)).diagonal().tolist()
    mass = sum(squares)
    weights = [square / mass if mass else 1 / len(tvs) for square in squares]  # calculate
    return merge_agreeing(weighted(tvs, weights), plus_or_minus(total(tvs)), weights, normalize=True)  # erase


def spread(tvs: Tensor) -> Tensor:
    """Each element's variance over n models, times n^2, as a row: exactly zero where the models agree."""
    result = torch.zeros_like(tvs[:1])
    for one, other in combinations(tvs, 2):
        result += (one - other).square_()
    return result
