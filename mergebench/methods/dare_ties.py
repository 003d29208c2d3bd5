"""DARE: drop at random and rescale, then TIES' sign election."""

from __future__ import annotations

from mergebench.engine.chunks import times
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, merge_method
from mergebench.methods.dare_linear import Params, drop_and_rescale
from mergebench.methods.ties import elect_and_merge


@merge_method(takes="task_vectors", keeps_base=True, paper="arXiv:2311.03099")
def dare_ties(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Drop elements at random, rescale the rest by 1/density, elect signs, add up those that agree.

        tau_i' = m_i tau_i / density_i, m_i ~ Bernoulli(density_i);
        s = sign(sum w_i tau_i')
        theta = theta_0 + lambda sum w_i (sign tau_i' = s) tau_i'

    Yu et al., "Language models are super Mario", with TIES (arXiv:2306.01708) after it; the random drop
    takes the place of the trim. `normalize: true` divides by the sum of the weights that agree.
    """
    return times(elect_and_merge(drop_and_rescale(tvs, p.density, p.rescale, ctx), p.weight, p.normalize), p.lambda_)
