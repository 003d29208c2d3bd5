"""Localize-and-Stitch without data: each model's largest changes, averaged where they overlap."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergebench.engine.chunks import total, trim
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, merge_method
from mergebench.engine.statistics import order_statistics
from mergebench.parameters import PerModel, param


@dataclass(frozen=True)
class Params:
    density: PerModel = param(0.05, "share of elements kept", above=0, high=1, per_model=True)


@merge_method(takes="task_vectors", keeps_base=True, paper="arXiv:2408.13656", scope="model")
def localize_stitch(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Keep each model's largest elements, average them where several models have some.

        theta = theta_0 + sum m_i tau_i / sum m_i,
        m_i = (|tau_i| is among the `density` largest)

    He et al., "Localize-and-Stitch", the variant without data (masks by magnitude, not learned). Every
    element at or above the threshold is kept; one that a model left as it was is in none of its masks.
    """
    # localize
    if min(p.density) < 1:
        ranks = [ctx.numel - max(int(ctx.numel * density), 1) for density in p.density]
        (threshold,) = yield order_statistics(tvs, [ranks], key=torch.abs, trim=True)
        tvs = trim(tvs, threshold)
    # stitch
    return total(tvs) / total(tvs.sign().abs_()).clamp_(min=1)
