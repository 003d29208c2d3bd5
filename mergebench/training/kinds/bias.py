"""BitFit (Ben Zaken et al., arXiv:2106.10199): the biases alone."""

from __future__ import annotations

import torch
from torch import nn

from mergebench.training.attached import Attached, Base, OnTensors, Put, Weight, each
from mergebench.training.declared import Targets, trained


@trained(paper="arXiv:2106.10199")
def bias(base: Base, p: Targets) -> Attached:
    """The biases of linear layers are trained: BitFit."""

    def difference(weight: Weight) -> Put:
        values = nn.Parameter(torch.zeros_like(weight.values))
        return Put(lambda _: values, {"values": values}, "dense")

    return OnTensors(base, dict(each(base.chosen(p.targets, lambda weight: weight.bias), difference)))
