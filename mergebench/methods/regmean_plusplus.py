"""RegMean++: RegMean by the inputs that a layer has in the merged model."""

from __future__ import annotations

from mergebench.engine.context import Context
from mergebench.engine.method import Passes, Tensor, Weights, merge_method
from mergebench.methods._matrices import is_matrix
from mergebench.methods.regmean import Params, regmean, workspace


@merge_method(
    takes="weights",
    statistics="gram",
    paper="arXiv:2508.03121",
    cut="tensor",
    whole=is_matrix,
    decompositions=lambda models, p: 1,
    workspace=workspace,
)
def regmean_plusplus(weights: Weights, p: Params, ctx: Context) -> Passes:
    """RegMean, layer after layer, with the inputs that each block has behind the merged blocks below it.

        theta = (sum G_i)^-1 sum G_i theta_i,
        G_i = X_i^T X_i, elements off the diagonal times alpha,
        X_i the inputs in model i's own block, on top of the merged blocks below

    Nguyen et al., "RegMean++: Enhancing effectiveness and generalization of regression mean for model
    merging". The models run before the merge, which then is RegMean's: give each model `data:`. Linear
    layers outside the blocks, embeddings and heads are averaged.
    """
    merged: Tensor = regmean(weights, p, ctx)
    return merged
