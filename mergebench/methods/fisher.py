"""Fisher merging: each element from the models that are sure of it."""

from __future__ import annotations

from dataclasses import dataclass

from mergebench.engine.chunks import column, total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, Weights, merge_method
from mergebench.methods.linear import normalized
from mergebench.parameters import PerModel, param


@dataclass(frozen=True)
class Params:
    weight: PerModel = param(1.0, "weight of the model, the paper's lambda", low=0, per_model=True)
    normalize: bool = param(True, "divide each model's Fisher information by its length, over all tensors")
    floor: float = param(1e-6, "added to each value: where no model has any, the average", above=0)


@merge_method(takes="weights", statistics="fisher", paper="arXiv:2111.09832")
def fisher(weights: Weights, p: Params, ctx: Context) -> Passes:
    """Average of the models, each element weighted by its Fisher information.

        theta = sum w_i F_i theta_i / sum w_i F_i,
        F_i = E_x E_(y ~ p_i(y | x)) (grad log p_i(y | x))^2, over the texts of task i

    Matena and Raffel, "Merging models with Fisher-weighted averaging": F is the diagonal, which
    `mergebench statistics --kind fisher` makes. As in their code, F_i is divided by its L2 norm, and a floor
    keeps the division possible.
    """
    assert ctx.on_data is not None, "the engine reads the declared statistics"
    norms = [norm if p.normalize and norm else 1.0 for norm in ctx.on_data.norms]
    f = (ctx.on_data.values / column(weights, norms) + p.floor) * column(weights, normalized(p.weight))
    centre = total(weights) / len(weights)  # only what differs from it is weighted: equal models stay as they are
    return centre + total(f * (weights - centre)) / total(f)
