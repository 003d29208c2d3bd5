"""Task arithmetic: the base plus a weighted sum of task vectors."""

from __future__ import annotations

from dataclasses import dataclass

from mergebench.engine.chunks import times, total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, merge_method
from mergebench.methods.linear import normalized
from mergebench.parameters import PerModel, param


@dataclass(frozen=True)
class Params:
    weight: PerModel = param(1.0, "weight of the model", per_model=True)
    lambda_: float = param(1.0, "factor on the merged task vector")
    normalize: bool = param(False, "divide by the sum of the weights")


@merge_method(takes="task_vectors", keeps_base=True, paper="arXiv:2212.04089")
def task_arithmetic(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Base plus the weighted sum of task vectors.

        theta = theta_0 + lambda sum w_i tau_i

    Ilharco et al., "Editing models with task arithmetic". A negative weight unlearns.
    """
    weights = normalized(p.weight) if p.normalize else p.weight
    return times(total(tvs, weights), p.lambda_)
