"""KnOTS: merging in the subspace that all task matrices span together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergebench.deltas.svd import svd, svd_bytes
from mergebench.engine.chunks import total, trim
from mergebench.engine.context import Context
from mergebench.engine.method import Bases, Passes, TaskVectors, Tensor
from mergebench.methods._matrices import matrices, matrix_method, mean
from mergebench.methods.ties import elect_and_merge
from mergebench.parameters import param

NEGLIGIBLE = 1e-5  # singular values up to it are dropped


@dataclass(frozen=True)
class Params:
    combine: str = param("ties", "how the aligned task matrices are merged", choices=("ties", "task_arithmetic"))
    density: float = param(0.2, "ties: share of elements kept of each aligned task matrix", above=0, high=1)
    lambda_: float = param(1.0, "factor on the merged task vector")


def workspace(shape: tuple[int, ...], models: int, p: Params) -> int:
    """The most of: all in float64, twice; the triangle's decomposition; aligned, trimmed, and those that agree."""
    (rows, columns), rank = shape, min(shape[0], models * shape[1])
    aligned = 8 * 4 * models * rank * columns + 2 * 8 * columns * (rank + rows)
    return 8 * rows * rank + max(17 * models * rows * columns, svd_bytes(rows, rank, 8), aligned)


@matrix_method(
    bases=Bases(room=1, keeps_columns=True),
    paper="arXiv:2410.19735",
    decompositions=lambda models, p: 2 * models,
    workspace=workspace,
)
def knots(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Task matrices aligned by one decomposition of all, merged there by TIES or task arithmetic.

        theta = theta_0 + lambda U merged(S V_1', .. S V_N'),
        U S [V_1' .. V_N'] = [tau_1 .. tau_N]

    Stoica et al., "Model merging with SVD to tie the KnOTS": the decomposition in float64 without s <=
    1e-5; the S V_i' are merged, and U takes the result back. TIES trims each S V_i' of a tensor by itself.
    Other tensors, embeddings and heads are averaged. `task_arithmetic` leaves out what s drops, and is
    plain task arithmetic otherwise. S V_i is computed as U^T tau_i, U from a QR decomposition's triangle.
    """
    stack = matrices(tvs, ctx)
    if stack is None:
        return mean(tvs) * p.lambda_
    beside = torch.cat([matrix.double().mT for matrix in stack])
    triangle = torch.linalg.qr(beside, mode="r").R
    del beside
    left, s, _ = svd(triangle.mT)
    left = left[:, s > NEGLIGIBLE]
    if not left.numel():
        return torch.zeros_like(tvs[0])
    aligned = torch.stack([(left.mT @ matrix.double()).float().view(-1) for matrix in stack])
    if p.combine == "ties":
        dropped = aligned.shape[1] - max(int(aligned.shape[1] * p.density), 1)
        threshold = aligned.abs().kthvalue(dropped + 1, dim=1, keepdim=True).values
        merged = elect_and_merge(trim(aligned, threshold), [1.0] * len(stack), normalize=True)
    else:
        merged = total(aligned)
    back: Tensor = left @ merged.view(left.shape[1], -1).double()
    return back.float().view(-1) * p.lambda_
