"""Iso-C: isotropic merging in the common subspace."""

from __future__ import annotations

from dataclasses import dataclass

from mergebench.deltas.svd import svd, svd_bytes
from mergebench.engine.chunks import total
from mergebench.engine.context import Context
from mergebench.engine.method import Bases, Passes, TaskVectors
from mergebench.methods._matrices import matrices, matrix_method, mean
from mergebench.parameters import param


@dataclass(frozen=True)
class Params:
    lambda_: float = param(1.0, "factor on the merged task vector, the paper's alpha")


def workspace(shape: tuple[int, ...], models: int, p: Params) -> int:
    """The sum and its decomposition."""
    return 4 * shape[0] * shape[1] + svd_bytes(*shape)


@matrix_method(
    bases=Bases(room=1),
    paper="arXiv:2502.04959",
    decompositions=lambda models, p: 1,
    workspace=workspace,
    exempt=dict.fromkeys(("one model", "equal models"), "its singular values are made equal"),
)
def iso_c(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """The sum of the task matrices with every singular value replaced by their mean.

        theta = theta_0 + lambda mean(S) U V', U S V' = sum tau_i

    Marczak et al., "No task left behind": Other tensors, embeddings and heads are averaged. Where the sum
    is of lower rank than min(m, n), the mean is over the triplets it has (the paper's further directions
    are arbitrary).
    """
    stack = matrices(tvs, ctx)
    if stack is None:
        return mean(tvs) * p.lambda_
    u, s, v = svd(total(stack))
    flat = s.mean().item() if len(s) else 0.0
    return (u @ v).view(-1).mul_(flat * p.lambda_)
