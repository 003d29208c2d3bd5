"""Weighted average of the models' weights (model soups)."""

from __future__ import annotations

from dataclasses import dataclass

from mergebench.engine.chunks import total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, Weights, merge_method
from mergebench.errors import RecipeError
from mergebench.parameters import PerModel, param


@dataclass(frozen=True)
class Params:
    weight: PerModel = param(1.0, "weight of the model", per_model=True)
    normalize: bool = param(True, "divide by the sum of the weights")


@merge_method(takes="weights", paper="arXiv:2203.05482")
def linear(weights: Weights, p: Params, ctx: Context) -> Passes:
    """Weighted average of the models.

        theta = sum w_i theta_i / sum w_i

    Wortsman et al., "Model soups" (uniform soup: all weights equal). A base listed among the models counts
    like any other.
    """
    shares = normalized(p.weight) if p.normalize else p.weight
    return total(weights, shares)


def normalized(weights: PerModel) -> PerModel:
    """Weights divided by their sum."""
    scale = sum(weights)
    if abs(scale) < 1e-8:
        raise RecipeError("parameters.weight: the weights add up to zero", "set normalize: false")
    return tuple(weight / scale for weight in weights)
