"""Multi-SLERP: the direction between any number of models, at their mean length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergebench.engine.chunks import total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, merge_method
from mergebench.engine.statistics import gram
from mergebench.errors import RunError
from mergebench.methods.linear import normalized
from mergebench.parameters import PerModel, param

CANCELLED = 1e-6  # if the sum keeps a smaller share of the directions' lengths, it is float32 rounding


@dataclass(frozen=True)
class Params:
    weight: PerModel = param(1.0, "weight of the model", per_model=True)
    normalize_weights: bool = param(True, "divide by the sum of the weights")
    eps: float = param(1e-8, "added to lengths before dividing by them", above=0)


@merge_method(
    takes="task_vectors",
    keeps_base=True,
    paper="goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    optional_base=True,
)
def multislerp(values: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Average the models' directions, at their average length.

        theta = (sum w_i |x_i|) s / |s|, s = sum w_i x_i / |x_i|
        x_i = theta_i; with a base x_i = tau_i, and theta_0 is added

    Goddard, "Multi-SLERP", on task vectors where there is a base. The published step in the tangent space
    at m is left out: what it adds, the part of sum w_i x_i / |x_i| across m, is zero. Two directions that
    cancel are averaged as they are; more are refused. A tensor that is zero in all models stays zero.
    """
    weights = np.array(normalized(p.weight) if p.normalize_weights else p.weight)
    dots = (yield gram(values)).cpu().numpy()
    lengths = np.sqrt(dots.diagonal())
    shares = weights / (lengths + p.eps)
    length = np.sqrt(max(shares @ dots @ shares, 0.0))
    if length > CANCELLED * (abs(shares) @ lengths):
        return total(values, (shares * (weights @ lengths / length)).tolist())
    if len(values) > 2 and lengths.any():
        where = "the models" if ctx.scope == "model" else ctx.spans[0].tensor
        raise RunError(f"{where}: the directions of the models cancel", "use other weights, or exclude the tensor")
    return total(values, weights.tolist())
