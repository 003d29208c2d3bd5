"""Singular value decompositions for the methods on matrices, and the memory they take."""

from __future__ import annotations

import torch
from torch import Tensor


def svd(matrix: Tensor, size: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors [m, r], singular values [r], right vectors [r, n], of numerical rank r.

    Triplets at rounding level, compared with `size` (or the largest singular value), are left out: their
    directions are arbitrary.
    """
    try:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # LAPACK's may not converge
        u, s, v = (part.to(matrix.dtype) for part in svd_by_gram(matrix))
    rank = int((s > rounding(matrix) * (s[:1].sum().item() if size is None else size)).sum())
    return u[:, :rank], s[:rank], v[:rank]


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition: the polar factor, zero where the matrix has no rank."""
    u, s, v = svd_by_gram(matrix)
    kept = s > rounding(matrix) * s[:1]
    return (u[:, kept] @ v[kept]).to(matrix.dtype)


def svd_by_gram(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All triplets, by the eigenvectors of the smaller Gram matrix; in float64, squaring loses nothing of float32.

    LAPACK's svd gives up where many singular values are equal, as those of stacked bases are.
    """
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = svd_by_gram(matrix.mT)
        return u.mT, s, v.mT
    exact = matrix.double()
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(exact.mT @ exact))
    s = values.clamp_(min=0).sqrt_()
    return (exact @ vectors).div_(s.clamp(min=torch.finfo(s.dtype).tiny)), s, vectors.mT


def rounding(matrix: Tensor) -> float:
    """Singular values up to this share of the largest may come from rounding (as measured, with a margin)."""
    return float(4 * torch.finfo(matrix.dtype).eps * max(matrix.shape) ** 0.5)


def svd_bytes(rows: int, columns: int, itemsize: int = 4) -> int:
    """What `svd` holds beside its input: a copy, the vectors, and LAPACK's workspace (as measured)."""
    return (2 * rows * columns + 6 * min(rows, columns) ** 2) * itemsize + (1 << 20)


def gram_bytes(rows: int, columns: int) -> int:
    """What `nearest_orthogonal` holds beside its input: float64 copies, and LAPACK's workspace (as measured)."""
    return (3 * rows * columns + 5 * min(rows, columns) ** 2) * 8 + (1 << 20)
