"""Model Breadcrumbs: drop the largest and the smallest, then TIES' sign election."""

from __future__ import annotations

from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, merge_method
from mergebench.methods.breadcrumbs import Params, between_outliers_and_noise
from mergebench.methods.ties import elect_and_merge


@merge_method(takes="task_vectors", keeps_base=True, paper="arXiv:2312.06795")
def breadcrumbs_ties(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Drop the largest elements, then the smallest until `density` is kept; elect signs, add up those that agree.

        tau_i' = m_i tau_i as in breadcrumbs; s = sign(sum w_i tau_i')
        theta = theta_0 + lambda sum w_i (sign tau_i' = s) tau_i'

    Davari and Belilovsky, "Model Breadcrumbs", with TIES (arXiv:2306.01708) after it; see `breadcrumbs` for
    what is dropped. `normalize: true` divides by the sum of the weights that agree.
    """
    tvs = yield from between_outliers_and_noise(tvs, p, ctx)
    return elect_and_merge(tvs, p.weight, p.normalize) * p.lambda_
