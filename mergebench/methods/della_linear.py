"""DELLA: drop at random, small elements more often, rescale, then task arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergebench.engine.chunks import by_rank, keep, total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, Tensor, merge_method
from mergebench.errors import RecipeError
from mergebench.methods.linear import normalized
from mergebench.parameters import PerModel, param

NEVER = 1e-9  # a share that no draw reaches, and that is safe to divide by


@dataclass(frozen=True)
class Params:
    density: PerModel = param(1.0, "mean share of elements kept", above=0, high=1, per_model=True)
    epsilon: PerModel = param(0.15, "how far the share kept varies with the rank", low=0, high=0.5, per_model=True)
    weight: PerModel = param(1.0, "weight of the model", per_model=True)
    lambda_: float = param(1.0, "factor on the merged task vector")
    normalize: bool = param(False, "divide by the sum of the weights")
    rescale: bool = param(True, "divide what is kept by its probability to be")


@merge_method(takes="task_vectors", keeps_base=True, paper="arXiv:2406.11617", cut="row")
def della_linear(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Drop elements at random, the smallest of a row most often, rescale the rest, add them up.

        theta = theta_0 + lambda sum w_i m_i tau_i / p_i, m_i ~ Bernoulli(p_i)
        p_i = density - epsilon (a row's smallest) to density + epsilon (its largest)

    Deep et al., "DELLA-Merging". Within a row (the last dimension), the probability to be kept rises
    linearly with the rank of the magnitude, from density - epsilon to density + epsilon. What is kept is
    divided by its own probability, as in the paper (unbiased), not by a ratio of norms as in mergekit. A
    density of 1 keeps all.
    """
    weights = normalized(p.weight) if p.normalize else p.weight
    return total(drop_by_magnitude(tvs, p, ctx), weights) * p.lambda_


def drop_by_magnitude(tvs: Tensor, p: Params, ctx: Context) -> Tensor:
    """m * tau / share with m ~ Bernoulli(share) and a share for each element: the paper's MagPrune."""
    columns = ctx.shape[-1] if ctx.shape else 1
    shares = torch.empty_like(tvs)
    for row, share, density, epsilon in zip(tvs, shares, p.density, p.epsilon, strict=True):
        if not 0 < density < 1:
            share.fill_(max(density, NEVER))
            continue
        if not epsilon < density <= 1 - epsilon:
            raise RecipeError(
                f"parameters.epsilon: {epsilon:g} reaches below 0 or above 1 around density {density:g}",
                "density - epsilon must be above 0, density + epsilon at most 1",
            )
        spread = 0.0 if columns == 1 else epsilon
        line = torch.linspace(density - spread, density + spread, columns).clamp_(min=NEVER).to(tvs.device)
        share.copy_(by_rank(row.reshape(-1, columns), line).reshape(-1))
    kept = keep(tvs, ctx.bernoulli(shares))
    return kept.div_(shares) if p.rescale else kept
