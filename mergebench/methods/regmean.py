"""RegMean: the matrix that answers every task's inputs most like that task's own model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergebench.engine.chunks import total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, Weights, merge_method
from mergebench.methods._gram import off_diagonal, solve
from mergebench.methods._matrices import is_matrix
from mergebench.parameters import param


@dataclass(frozen=True)
class Params:
    alpha: float = param(0.9, "factor on the Gram matrices off their diagonals", low=0, high=1)


def workspace(shape: tuple[int, ...], models: int, p: Params) -> int:
    """The Gram matrices in float32; their sum, another and its factors, and the sides of the equation in float64."""
    inputs = max(shape)  # which side it is, the header does not say
    return (4 * models + 8 * 5) * inputs * inputs + 8 * 5 * shape[0] * shape[1]


@merge_method(
    takes="weights",
    statistics="gram",
    paper="arXiv:2212.09849",
    cut="tensor",
    whole=is_matrix,
    decompositions=lambda models, p: 1,
    workspace=workspace,
)
def regmean(weights: Weights, p: Params, ctx: Context) -> Passes:
    """Linear layers in closed form by what their inputs are; everything else is averaged.

        theta = (sum G_i)^-1 sum G_i theta_i,
        the argmin of sum |X_i theta - X_i theta_i|^2 for G_i = X_i^T X_i of task i's
        texts; elements of G_i off the diagonal are taken times alpha

    Jin et al., "Dataless knowledge fusion by merging weights of language models" (theta is [inputs, outputs]):
    `mergebench statistics --kind gram` makes G, a mean over the tokens. Solved in float64. The paper's alpha
    keeps the sum invertible. The weights of an input that no text has are averaged; with alpha 1 so are
    directions at rounding level, of inputs at one scale. Embeddings and heads are averaged.
    """
    centre = total(weights) / len(weights)
    if ctx.on_data is None:
        return centre
    grams, first = ctx.on_data.values, ctx.on_data.inputs_first
    rows = (weights - centre).view(len(weights), *ctx.shape)  # around the mean: equal models stay as they are
    inputs = ctx.shape[0 if first else 1]
    summed = torch.zeros(inputs, inputs, dtype=torch.float64, device=weights.device)
    pull = torch.zeros(inputs, weights.shape[1] // inputs, dtype=torch.float64, device=weights.device)
    for gram, matrix in zip(grams, rows, strict=True):
        scaled = off_diagonal(gram.double(), p.alpha)
        summed += scaled
        pull += scaled @ (matrix if first else matrix.mT).double()
        del scaled
    moved = solve(summed, pull, p.alpha < 1)
    return centre + (moved if first else moved.mT).reshape(-1).float()
