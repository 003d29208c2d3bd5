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
    """Elect one vector, mask it for each task, rescale: theta_0 + lambda_i M_i tau, a model for each task.

    Huang et al., "EMR-Merging: Tuning-free high-performance model merging". tau has the sign of sum tau_i and
    the largest magnitude among the tau_i that have it (section 3.2); M_i is where tau_i has it; lambda_i =
    |tau_i| / |M_i tau| in the L1 norm over all that is merged (zero where M_i tau is).
    """
    sign = total(tvs).sign_()
    along = tvs * sign  # above zero where a task has the elected sign
    unified = reduce(torch.maximum, along).relu_() * sign
    masks = along > 0
    masked = keep(unified.expand_as(tvs), masks)
    lengths = yield norms(torch.cat([tvs, masked]))
    own, left = lengths.view(2, -1).tolist()
    return Tasks(unified, masks, tuple(one / other if other else 0.0 for one, other in zip(own, left, strict=True)))
