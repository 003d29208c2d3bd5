"""RAM+, tensor-local: RAM that makes up for what averaging takes from a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mergebench.engine.chunks import total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, merge_method
from mergebench.engine.statistics import gram
from mergebench.methods.ram import touched
from mergebench.parameters import param


@dataclass(frozen=True)
class Params:
    epsilon: float = param(1e-5, "magnitude above which a model has touched an element", low=0)
    r: float = param(0.1, "how much a model's own elements grow with its ratio of shared to own ones")
    alpha: float = param(0.2, "the largest ratio that counts", low=0)


@merge_method(takes="task_vectors", keeps_base=True, paper="arXiv:2601.13572")
def ramplus_tl(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Average the elements that several models touched, scale up those that one did.

        theta = theta_0 + sum g_i m_i tau_i / sum m_i, m_i = (|tau_i| > epsilon)
        g_i = 1 + r min(shared_i / own_i, alpha) where model i alone touched it, else 1

    "Reinforced Agent Merging", RAM+ with a ratio for each tensor (`scope: model`: for the model). own_i and
    shared_i count the elements that model i touched alone and with others.
    """
    touching, mask = touched(tvs, p.epsilon)
    count = total(mask).clamp_(min=1)
    alone = (2 - count).relu_()  # one where a single model, or none, touched the element
    counts = yield gram(torch.cat([mask, alone.unsqueeze(0)]))
    growth = []
    for model in range(len(tvs)):
        every, own = float(counts[model, model]), float(counts[model, -1])
        ratio = (every - own) / own if own else math.inf if every else 0.0
        growth.append(p.r * min(ratio, p.alpha))
    return total(touching) / count + total(touching, growth) * alone
