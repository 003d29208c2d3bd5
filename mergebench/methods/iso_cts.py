"""Iso-CTS: isotropic merging in common and task-specific subspaces."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergebench.deltas.svd import gram_bytes, nearest_orthogonal, svd, svd_by_gram, svd_bytes
from mergebench.engine.chunks import total
from mergebench.engine.context import Context
from mergebench.engine.method import Bases, Passes, TaskVectors
from mergebench.methods._matrices import matrices, matrix_method, mean
from mergebench.parameters import param


@dataclass(frozen=True)
class Params:
    lambda_: float = param(1.0, "factor on the merged task vector, the paper's alpha")
    common_space_fraction: float = param(0.8, "share of the directions that are the sum's own", low=0, high=1)


def workspace(shape: tuple[int, ...], models: int, p: Params) -> int:
    """The stacked vectors three times, a task matrix minus the common space, and a decomposition."""
    stacked = 3 * 4 * sum(shape) * min(shape)
    return stacked + 2 * 4 * shape[0] * shape[1] + max(svd_bytes(*shape), gram_bytes(*shape))


@matrix_method(
    bases=Bases(room=5),  # each task keeps a fifth of 1/N of the directions, which must include all of its own
    paper="arXiv:2502.04959",
    decompositions=lambda models, p: models + 3,
    workspace=workspace,
    exempt=dict.fromkeys(("one model", "equal models"), "its singular values are made equal"),
)
def iso_cts(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Iso-C with the sum's weakest directions given to what each task has outside of it.

        theta = theta_0 + lambda mean(S) U V'
        U, S, V = the first triplets of sum tau_i and of each (I - U_k U_k') tau_i

    Marczak et al., "No task left behind": the first k triplets of sum tau_i; of each (I - U_k U_k^T) tau_i
    the first (r - k) / N, rounded (the sum keeps the rest of r = min(m, n)); stacked, made orthogonal as in
    TSV-M, with all singular values replaced by their mean. Other tensors, embeddings and heads are
    averaged. Triplets and stacked directions at rounding level, arbitrary in the paper, count as zero and
    not in the mean.
    """
    stack = matrices(tvs, ctx)
    if stack is None:
        return mean(tvs) * p.lambda_
    n, r = len(stack), min(ctx.shape)
    each = min(round((r - int(r * p.common_space_fraction)) / n), r // n)
    u, s, v = (part.clone() for part in first(svd(total(stack)), r - n * each))
    lefts, values, rights = [u], [s], [v]
    for matrix in stack if each else ():
        size = torch.linalg.matrix_norm(matrix).item()
        own = first(svd_by_gram(matrix - u @ (u.mT @ matrix), size), each)
        for kept, part in zip((lefts, values, rights), own, strict=True):
            kept.append(part.clone())
        del own
    flat = torch.cat(values).mean().item() if any(len(part) for part in values) else 0.0
    left, right = nearest_orthogonal(torch.cat(lefts, dim=1)), nearest_orthogonal(torch.cat(rights))
    return (left @ right).view(-1).mul_(flat * p.lambda_)


def first(triplets: tuple[torch.Tensor, ...], k: int) -> tuple[torch.Tensor, ...]:
    """The k largest of a decomposition's triplets."""
    u, s, v = triplets
    return u[:, :k], s[:k], v[:k]
