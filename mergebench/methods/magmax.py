"""MagMax: the largest change wins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch

from mergebench.engine.chunks import plus_or_minus
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, merge_method
from mergebench.parameters import param


@dataclass(frozen=True)
class Params:
    lambda_: float = param(1.0, "factor on the merged task vector")


@merge_method(takes="task_vectors", keeps_base=True, paper="arXiv:2407.06322")
def magmax(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """For each element the change of largest magnitude among the models.

        theta = theta_0 + lambda tau_k, k = argmax_i |tau_i|, for each element

    Marczak et al., "MagMax". Of equal magnitudes with different signs, plus is taken.
    """
    high, low = reduce(torch.maximum, tvs), reduce(torch.minimum, tvs)
    magnitude = torch.maximum(high.abs(), low.abs())
    return magnitude * plus_or_minus(high + low) * p.lambda_
