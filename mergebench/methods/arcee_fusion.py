"""Arcee Fusion: take over from the other model what differs most."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergebench.engine.chunks import exp, log, row_total, rows_of
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, Weights, merge_method
from mergebench.engine.statistics import order_statistics

ORDER = "the first model is the one that is kept"


@dataclass(frozen=True)
class Params:
    pass


@merge_method(takes="weights", paper="arcee.ai", cut="row", models=2, exempt={"order": ORDER})
def arcee_fusion(weights: Weights, p: Params, ctx: Context) -> Passes:
    """Keep the base but for the elements that differ most, which come from the other model.

        theta = b where I >= median(I) + 1.5 (q_3(I) - q_1(I)), else a
        I = |b - a| KL(softmax b || softmax a), a the base, b the other model

    Arcee's Fusion, as in mergekit; the divergence is that of the element's row. The quartiles are exact
    (mergekit draws a million elements), the divergence is computed in float64: rows of a fine-tune are so
    alike that float32 loses it. Without a base the first model is one.
    """
    rows = rows_of(weights, ctx.shape).double()
    softmax = exp(rows - rows.amax(dim=2, keepdim=True))
    softmax = softmax / row_total(softmax) + 1e-8
    divergence = row_total(softmax[1] * log(softmax[1] / softmax[0])).clamp(min=0)
    importance = ((rows[1] - rows[0]).abs() * divergence).float().reshape(1, -1)
    last = ctx.numel - 1
    first, median, third = yield order_statistics(importance, [last // 4, last // 2, 3 * last // 4])
    fused = importance >= median + 1.5 * (third - first)
    return torch.where(fused[0], weights[1], weights[0])
