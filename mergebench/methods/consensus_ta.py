"""Consensus task arithmetic: the sum of the task vectors where enough tasks want it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergebench.engine.chunks import column, plus_or_minus, total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, Tensor, merge_method
from mergebench.errors import RecipeError
from mergebench.parameters import PerModel, param


@dataclass(frozen=True)
class Params:
    tall_lambda: PerModel = param(0.4, "how strict the model's mask is, the paper's lambda_t", low=0, per_model=True)
    k: int = param(2, "masks that must hold an element for it to be kept", low=0)
    lambda_: float = param(1.0, "factor on the merged task vector, the paper's alpha")


@merge_method(
    takes="task_vectors",
    keeps_base=True,
    paper="arXiv:2405.07813",
    exempt={"equal models": "it gives the sum of the task vectors, not their mean"},
)
def consensus_ta(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Task arithmetic on the elements that at least k models' TALL masks hold.

        theta = theta_0 + lambda (sum m_i >= k) tau, tau = sum tau_i,
        m_i = (|tau_i| >= tall_lambda_i |tau - tau_i|)

    Wang et al., "Localizing task information for improved model merging and compression". The authors
    choose tall_lambda from 0.2 to 0.6 on validation data, and lambda too.
    """
    n = len(tvs)
    if p.k > n:
        raise RecipeError(f"parameters.k: {p.k} masks of {n} models", "at most as many as there are models")
    merged = total(tvs)
    balance = total(tall_masks(tvs, merged, p.tall_lambda))  # number of models for the element minus number against
    kept = plus_or_minus(balance - (2 * p.k - n)).relu_()
    return merged * kept * p.lambda_


def tall_masks(tvs: Tensor, merged: Tensor, limits: Sequence[float]) -> Tensor:
    """Plus one where a model's mask holds the element, minus one elsewhere (section 4)."""
    return plus_or_minus(tvs.abs() - (merged - tvs).abs_().mul_(column(tvs, limits)))
