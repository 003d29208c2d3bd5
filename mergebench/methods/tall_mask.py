"""TALL-masks: one task's model, found again in the sum of the task vectors."""

from __future__ import annotations

from dataclasses import dataclass

from mergebench.engine.chunks import total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, merge_method
from mergebench.errors import RecipeError
from mergebench.methods.consensus_ta import tall_masks
from mergebench.parameters import param


@dataclass(frozen=True)
class Params:
    task: int = param(help="the model to find again: 1 for the first (a base among them is not counted)", low=1)
    tall_lambda: float = param(0.4, "how strict the mask is, the paper's lambda_t", low=0)
    lambda_: float = param(1.0, "factor on the masked task vector")


@merge_method(
    takes="task_vectors",
    keeps_base=True,
    paper="arXiv:2405.07813",
    exempt={
        "equal models": "it gives the sum of the task vectors, not their mean",
        "order": "`task` counts the models",
    },
)
def tall_mask(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """The sum of the task vectors where one model's mask holds it: what the mask preserves of that model.

        theta = theta_0 + lambda m_t tau, tau = sum tau_i,
        m_t = (|tau_t| >= tall_lambda |tau - tau_t|)

    Wang et al., "Localizing task information for improved model merging and compression". One recipe, and
    one checkpoint, for each task.
    """
    if p.task > len(tvs):
        raise RecipeError(f"parameters.task: {p.task} of {len(tvs)} models", "1 names the first model, the base aside")
    merged, own = total(tvs), tvs[p.task - 1 : p.task]
    return merged * tall_masks(own, merged, [p.tall_lambda])[0].relu_() * p.lambda_
