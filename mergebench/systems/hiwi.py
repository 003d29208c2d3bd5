"""HiWi (Liao, Meng, Monz, arXiv:2305.16742): an adapter that reads a weight or a bias, in place of what flows past it.

    W' = W + B relu(A W)        b' = b + B relu(A b)        A [r, out], B [out, r]

In the paper's words W <- W + f(W W_down) W_up, with W stored [in, out]: the adapter is along the outputs. B starts at
zero, so that the first difference is zero to the bit. When training is over the adapter is hidden in what it made: of
biases only the differences are saved, whatever r was; of weights the factors, which are smaller than a difference.

It is PEANuT without hidden layers (`deltas/peanut.py`). A bias whose A b is negative in every row cannot move.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mergebench.checkpoint.names import module_kind
from mergebench.deltas.peanut import Network, peanut
from mergebench.errors import RecipeError
from mergebench.parameters import param
from mergebench.training.attached import Attached, Base, OnTensors, Put, Weight, each, put, start, uniform
from mergebench.training.declared import trained


@dataclass(frozen=True, kw_only=True)
class Params:
    """The settings of HiWi."""

    on: str = param("biases", "what the adapter reads and changes", choices=("biases", "weights"))
    rank: int = param(8, "of the adapter", low=1)
    targets: list[str] = param([], "globs of the tensors to change; those of feed-forward layers where not given")


@trained(paper="arXiv:2305.16742")
def hiwi(base: Base, p: Params) -> Attached:
    """An adapter on the biases or weights of feed-forward layers: HiWi."""

    def adapted(weight: Weight) -> Put:
        turned = p.on == "biases" or weight.in_out  # outputs are columns of the stored tensor
        out = weight.values.shape[-1 if turned else 0]
        network = Network(start((out, p.rank), base.generator, 0), uniform((p.rank, out), base.generator))
        made = put(peanut, replace(network, columns=turned), columns=turned)
        return _hidden(made, weight) if p.on == "biases" else made

    return OnTensors(base, dict(each(_chosen(base, p), adapted)))


def _chosen(base: Base, p: Params) -> dict[str, Weight]:
    of_biases = p.on == "biases"

    def default(weight: Weight) -> bool:
        return (weight.bias if of_biases else weight.linear) and module_kind(weight.name) == "MLP"

    found = base.chosen(p.targets, default)
    if not of_biases:
        return base.matrices(list(found), p.rank)
    for name, one in found.items():
        if one.values.dim() != 1:
            raise RecipeError(f"targets: {name}: {list(one.values.shape)} is no bias", "on: weights, or name biases")
    return found


def _hidden(made: Put, bias: Weight) -> Put:
    """The same change, saved as the difference it is."""

    def difference() -> dict[str, torch.Tensor]:
        return {"values": made.change(bias.values)}

    return replace(made, kind="dense", settings=dict, saved=difference)
