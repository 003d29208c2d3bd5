"""Singular value decompositions for the methods on matrices, and the memory they take."""

from __future__ import annotations

import torch
from torch import Tensor


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors [m, r], singular values [r], right vectors [r, n], of numerical rank r.

    Triplets at rounding level are left out: their directions are arbitrary.
    """
    try:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return svd_by_gram(matrix)
    return _significant(u, s, v, s[:1].sum().item())


def svd_by_gram(matrix: Tensor, size: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the eigenvectors of the smaller Gram matrix; in float64, squaring loses nothing of float32.

    LAPACK's svd gives up where many singular values are equal, as those of stacked bases are. What is
    rounding is compared with `size`, by default the largest singular value.
    """
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = svd_by_gram(matrix.mT, size)
        return u.mT, s, v.mT
    exact = matrix.double()
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(exact.mT @ exact))
    s = values.clamp_(min=0).sqrt_()
    u = (exact @ vectors).div_(s.clamp(min=torch.finfo(s.dtype).tiny))
    u, s, v = (part.to(matrix.dtype) for part in (u, s, vectors.mT))
    return _significant(u, s, v, s[:1].sum().item() if size is None else size)


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition: the polar factor, zero where the matrix has no rank."""
    u, _, v = svd_by_gram(matrix)
    return u @ v


def _significant(u: Tensor, s: Tensor, v: Tensor, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """The triplets above what rounding makes of a matrix whose largest singular value is `size`, as measured."""
    rounding = 4 * torch.finfo(s.dtype).eps * max(len(u), v.shape[1]) ** 0.5
    rank = int((s > rounding * size).sum())
    return u[:, :rank], s[:rank], v[:rank]


def svd_bytes(rows: int, columns: int, itemsize: int = 4) -> int:
    """What `svd` holds beside its input: a copy, the vectors, and LAPACK's workspace (as measured)."""
    return (2 * rows * columns + 6 * min(rows, columns) ** 2) * itemsize + (1 << 20)


def gram_bytes(rows: int, columns: int) -> int:
    """What `nearest_orthogonal` holds beside its input: float64 copies, and LAPACK's workspace (as measured)."""
    return (3 * rows * columns + 7 * min(rows, columns) ** 2) * 8 + (1 << 20)
