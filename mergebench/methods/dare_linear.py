"""DARE: drop at random and rescale, then task arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from mergebench.engine.chunks import column, keep, times, total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, Tensor, merge_method
from mergebench.methods.linear import normalized
from mergebench.parameters import PerModel, param

NEVER = 2.0**-33  # a share that no draw reaches; one above a smaller share may lie beyond float32


@dataclass(frozen=True)
class Params:
    density: PerModel = param(1.0, "share of elements kept", above=0, high=1, per_model=True)
    weight: PerModel = param(1.0, "weight of the model", per_model=True)
    lambda_: float = param(1.0, "factor on the merged task vector")
    normalize: bool = param(False, "divide by the sum of the weights")
    rescale: bool = param(True, "divide what is kept by the density")


@merge_method(takes="task_vectors", keeps_base=True, paper="arXiv:2311.03099")
def dare_linear(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Drop elements at random, rescale the rest by 1/density, add them up.

        theta = theta_0 + lambda sum w_i m_i tau_i / density_i,
        m_i ~ Bernoulli(density_i)

    Yu et al., "Language models are super Mario". The rescale is the paper's (unbiased), not a ratio of
    norms.
    """
    weights = normalized(p.weight) if p.normalize else p.weight
    return times(total(drop_and_rescale(tvs, p.density, p.rescale, ctx), weights), p.lambda_)


def drop_and_rescale(tvs: Tensor, density: PerModel, rescale: bool, ctx: Context) -> Tensor:
    """m * tau / density with m ~ Bernoulli(density) (section 3.1)."""
    kept = keep(tvs, ctx.bernoulli(density))
    return kept.mul_(column(kept, [1 / max(share, NEVER) for share in density])) if rescale else kept
