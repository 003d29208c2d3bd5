"""RAM: sum what one model touched, average what several did."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergebench.engine.chunks import total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, Tensor, merge_method
from mergebench.parameters import param


@dataclass(frozen=True)
class Params:
    epsilon: float = param(1e-5, "magnitude above which a model has touched an element", low=0)


@merge_method(takes="task_vectors", keeps_base=True, paper="arXiv:2601.13572")
def ram(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Average each element over the models that touched it.

        theta = theta_0 + sum m_i tau_i / sum m_i, m_i = (|tau_i| > epsilon)

    "Reinforced Agent Merging": an element that a single model touched keeps that model's full change.
    """
    touching, mask = touched(tvs, p.epsilon)
    return total(touching) / total(mask).clamp_(min=1)


def touched(tvs: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The task vectors where a model touched the element, zero elsewhere; and ones there."""
    touching = torch.hardshrink(tvs, epsilon)
    return touching, touching.sign().abs_()
