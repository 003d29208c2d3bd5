"""DELLA: drop at random, small elements more often, rescale, then elect signs."""

from __future__ import annotations

from dataclasses import dataclass

from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, merge_method
from mergebench.methods import della_linear
from mergebench.methods.ties import elect_and_merge
from mergebench.parameters import param


@dataclass(frozen=True)
class Params(della_linear.Params):
    normalize: bool = param(True, "divide by the sum of the weights that agree")


@merge_method(takes="task_vectors", keeps_base=True, paper="arXiv:2406.11617", cut="row")
def della(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Drop elements at random, the smallest of a row most often, rescale, elect signs, average those that agree.

        tau_i' = m_i tau_i / p_i as in della_linear; s = sign(sum w_i tau_i')
        theta = theta_0 + lambda sum w_i m_i' tau_i' / sum w_i m_i',
        m_i' = (sign tau_i' = s)

    Deep et al., "DELLA-Merging": drop, elect, fuse; see `della_linear` for what is dropped and how the rest
    is rescaled. Signs are elected and combined as in TIES (arXiv:2306.01708).
    """
    return elect_and_merge(della_linear.drop_by_magnitude(tvs, p, ctx), p.weight, p.normalize) * p.lambda_
