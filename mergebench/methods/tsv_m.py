"""TSV-M: merging by task singular vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergebench.deltas.svd import gram_bytes, nearest_orthogonal, svd, svd_bytes
from mergebench.engine.context import Context
from mergebench.engine.method import Bases, Passes, TaskVectors
from mergebench.methods._matrices import matrices, matrix_method, mean
from mergebench.parameters import param


@dataclass(frozen=True)
class Params:
    lambda_: float = param(1.0, "factor on the merged task vector, the paper's alpha")


def workspace(shape: tuple[int, ...], models: int, p: Params) -> int:
    """The stacked vectors three times (gathered, side by side, orthogonal), and a decomposition."""
    return 3 * 4 * sum(shape) * min(shape) + max(svd_bytes(*shape), gram_bytes(*shape))


@matrix_method(
    bases=Bases(room=1),  # each task keeps 1/N of the directions, which must include all of its own
    paper="arXiv:2412.00081",
    decompositions=lambda models, p: models + 2,
    workspace=workspace,
    exempt={"equal models": "it keeps a part of each task's singular triplets, here the same part"},
)
def tsv_m(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Low-rank task matrices side by side, their singular vectors made orthogonal across tasks.

        theta = theta_0 + lambda U diag(S_1 .. S_N) V',
        tau_i = U_i S_i V_i' without the smaller singular values
        U = the orthogonal matrix nearest to [U_1 .. U_N], and V likewise

    Gargiulo et al., "Task singular vectors": of each task matrix the first floor(min(m, n) / N) triplets.
    Other tensors, embeddings and heads are averaged. Where the paper's result is arbitrary: triplets and
    stacked directions at rounding level count as zero; at least one triplet of each task is kept.
    """
    stack = matrices(tvs, ctx)
    if stack is None:
        return mean(tvs) * p.lambda_
    k = max(min(ctx.shape) // len(tvs), 1)
    lefts, values, rights = [], [], []
    for matrix in stack:
        u, s, v = svd(matrix)
        lefts.append(u[:, :k].clone())  # a slice would keep all of u
        values.append(s[:k])
        rights.append(v[:k].clone())
        del u, v
    left, right = nearest_orthogonal(torch.cat(lefts, dim=1)), nearest_orthogonal(torch.cat(rights))
    return (left * torch.cat(values) @ right).view(-1) * p.lambda_
