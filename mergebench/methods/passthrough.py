"""Passthrough: one model as it is, or scaled."""

from __future__ import annotations

from dataclasses import dataclass

from mergebench.engine.chunks import total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, Weights, merge_method
from mergebench.parameters import PerModel, param


@dataclass(frozen=True)
class Params:
    scale: PerModel = param(1.0, "factor on the weights", per_model=True)


@merge_method(takes="weights", paper="arXiv:2403.13257", models=1)
def passthrough(weights: Weights, p: Params, ctx: Context) -> Passes:
    """Take one model's tensors as they are, or scaled.

        theta = scale theta_1

    Goddard et al., "Arcee's MergeKit". A base counts as the model: name the same one, or none.
    """
    return total(weights, p.scale)
