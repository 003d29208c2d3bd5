"""PCB-Merging: parameter competition balancing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergebench.engine.chunks import clamp, exp, rescale, tanh, total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, Tensor, merge_method
from mergebench.engine.statistics import order_statistics
from mergebench.parameters import PerModel, param

CLIP = {"readme": 1e-4, "nlp": 0.01, "vision-es": 0.01, "vision": 0.01}

FACTORS = "weights are factors of the models, not shares: equal models at weight 1 give that model"


@dataclass(frozen=True)
class Params:
    density: float = param(0.1, "share of elements kept, the paper's r", above=0, high=1)
    lambda_: float = param(1.0, "factor on the merged task vector")
    weight: PerModel = param(1.0, "factor lambda_i on the model's task vector", per_model=True)
    variant: str = param("readme", "which of the authors' four programs", choices=tuple(CLIP))
    clip: float | None = param(None, "share winsorised at each end (default: the variant's own)", low=0, high=0.49)


@merge_method(
    takes="task_vectors", keeps_base=True, paper="arXiv:2410.02396", scope="model", exempt={"equal models": FACTORS}
)
def pcb(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Let parameters compete within and across tasks, drop the losers, average the rest by their scores.

        z_i = |tau_i| from 0 to 1; score_i = exp(N z_i^2) tanh(tau_i sum tau_j);
        c_i = the highest scores from 0 to 1
        theta = theta_0 + lambda sum w_i c_i tau_i / sum c_i

    Du et al., "Parameter competition balancing for model merging" (NeurIPS 2024), as the authors' code
    computes it, at model scope (shown: the variant `readme`; the magnitude is winsorised in all). A model
    whose task vector is zero is refused at model scope; at tensor scope a zero tensor contributes nothing.
    Where `density` would keep no element, the best one is kept; a tensor of one element keeps the base's
    value.
    """
    n, d = len(tvs), ctx.numel
    clip = CLIP[p.variant] if p.clip is None else p.clip
    magnitude = tvs.abs()
    low, high = yield order_statistics(magnitude, [int(d * clip), max(int(d * (1 - clip) - 1), 0)])
    if ctx.scope == "model":
        refuse_zero(high, ctx)
    magnitude = clamp(magnitude, low, high)
    size = rescale(magnitude, low, high)
    within = exp(size * size * n)  # intra-balancing
    across = balance_across(p.variant, tvs, size)  # inter-balancing
    score = within * across
    floor, top = yield order_statistics(score, [max(min(int(d * (1 - p.density)), d - 2), 0), d - 1])  # drop
    share = rescale(torch.maximum(score, floor), floor, top)
    merged = total(tvs.sign() * magnitude * share, p.weight)  # rescale
    return merged / total(share).clamp_(min=1e-12) * p.lambda_


def balance_across(variant: str, tvs: Tensor, size: Tensor) -> Tensor:
    """How far each element agrees with the other tasks, in each of the authors' programs."""
    if variant in ("readme", "nlp"):
        return tanh(tvs * total(tvs))
    signed = tvs.sign() * size
    if variant == "vision":
        return tanh(tvs * total(signed))
    return torch.stack([total(tanh(signed * row)) for row in signed])


def refuse_zero(high: Tensor, ctx: Context) -> None:
    for model, magnitude in enumerate(high.reshape(-1).tolist()):
        if magnitude == 0:
            raise ctx.refuse(model, "its task vector is zero (but for a share below `clip`)", "leave this model out")
