"""Equations with Gram matrices, for RegMean."""

from __future__ import annotations

import torch

from mergebench.engine.method import Tensor


def off_diagonal(gram: Tensor, alpha: float) -> Tensor:
    """Change a matrix: all but its diagonal times alpha."""
    kept = gram.diagonal().clone()
    gram.mul_(alpha).diagonal().copy_(kept)
    return gram


def solve(matrix: Tensor, right: Tensor, definite: bool) -> Tensor:
    """matrix^+ right of a symmetric matrix without negative eigenvalues, which is changed; definite: it is invertible
    but for zero rows.

    Inputs are brought to one scale first. Without `definite`, eigenvalues at the rounding level of float32 count as
    zero.
    """
    size = matrix.diagonal().clamp(min=0).sqrt()
    scale = torch.where(size > 0, 1 / size, 0.0)
    unit = matrix.mul_(scale).mul_(scale[:, None])
    if definite:
        unit.diagonal().add_((size == 0).to(unit.dtype))
        factor, wrong = torch.linalg.cholesky_ex(unit)
        if not wrong:
            return torch.cholesky_solve(right * scale[:, None], factor) * scale[:, None]
        unit.diagonal().sub_((size == 0).to(unit.dtype))
    values, vectors = torch.linalg.eigh(unit)
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float32).eps
    values, vectors = values[kept], vectors[:, kept]
    moved: Tensor = vectors @ ((vectors.mT @ (right * scale[:, None])) / values[:, None]) * scale[:, None]
    return moved
