"""EMR-Merging: one vector for all tasks, a mask and a factor for each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch

from mergebench.engine.chunks import keep, total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, Tasks, TaskVectors, merge_method
from mergebench.engine.statistics import norms


@dataclass(frozen=True)
class Params:
    pass


EACH = "it gives a vector, and a mask and a factor for each model"


@merge_method(
    takes="task_vectors",
    paper="arXiv:2405.17461",
    gives="deltas",
    scope="model",
    exempt=dict.fromkeys(("one model", "equal models"), EACH),
)
def emr(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Elect one vector, mask it for each task, rescale: a model for each task.

        theta_i = theta_0 + lambda_i M_i tau, lambda_i = |tau_i| / |M_i tau|,
        M_i = (tau_i tau > 0)
        tau = s max |tau_i| over the tau_i of sign s = sign(sum tau_i)

    Huang et al., "EMR-Merging: Tuning-free high-performance model merging". tau is that of section 3.2; the
    norms are L1, over all that is merged (lambda_i is zero where M_i tau is).
    """
    sign = total(tvs).sign_()
    along = tvs * sign  # above zero where a task has the elected sign
    unified = reduce(torch.maximum, along).relu_() * sign
    masks = along > 0
    masked = keep(unified.expand_as(tvs), masks)
    lengths = yield norms(torch.cat([tvs, masked]))
    own, left = lengths.view(2, -1).tolist()
    return Tasks(unified, masks, tuple(one / other if other else 0.0 for one, other in zip(own, left, strict=True)))
