"""Singular value decompositions: in full, of the first triplets, or of a product of factors without forming it; and
linear systems."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:  # listing the methods must not wait for torch
    from torch import Tensor

SMALL = 512  # up to this many rows or columns, a full decomposition is quick
FIRST = 32  # directions computed first if the rank is not given
EXTRA = 10  # directions computed in addition to those wanted
ROUNDS, CHANGE = 60, 1e-7  # the search ends when a round adds less than this share of energy


class Product(NamedTuple):
    """B @ A, float32, and the squared norms of it and of the matrix it approximates."""

    b: Tensor
    a: Tensor
    kept: float
    total: float


def compress(b: Tensor, a: Tensor, rank: int) -> Product:
    """The best approximation of B @ A by `rank` (Eckart-Young), computed in the factors' own small space.

    With B = Q_b R_b and A' = Q_a R_a, the singular values of B A are those of R_b R_a'.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _product((q_b @ u) * s, s, v @ q_a.T, rank, float(s.square().sum()))


def truncate(matrix: Tensor, rank: int, seed: int = 0, full: bool = False) -> Product:
    """The best approximation of a matrix by `rank`; full: by a full decomposition, however large the matrix is."""
    found = _all(matrix) if full or _needs_all(matrix, rank) else _search(matrix, rank, seed)
    return _product(*found, rank, squared_norm(matrix))


def keep_energy(matrix: Tensor, share: float, seed: int = 0) -> Product:
    """The product of the smallest rank that keeps `share` of a matrix's squared norm.

    The number of directions grows until they suffice; if most are needed, all are computed at once.
    """
    total, rank = squared_norm(matrix), FIRST
    while True:
        everything = _needs_all(matrix, rank)
        us, s, v = _all(matrix) if everything else _search(matrix, rank, seed)
        energy = s[: len(s) if everything else rank].double().square()
        enough = torch.nonzero(energy.cumsum(0) >= share * total)
        if len(enough) or everything:
            return _product(us, s, v, int(enough[0]) + 1 if len(enough) else len(s), total)
        # the missing singular values are no larger than the last
        missing = (share * total - float(energy.sum())) / max(float(energy[-1]), 1e-9 * total)
        rank = max(2 * rank, rank + int(missing))


def squared_norm(matrix: Tensor) -> float:
    return sum((float(matrix[row : row + 256].double().square().sum()) for row in range(0, len(matrix), 256)), 0.0)


def _needs_all(matrix: Tensor, rank: int) -> bool:
    """Whether a full decomposition is quicker than a search."""
    least = min(matrix.shape)
    return least <= SMALL or 4 * (rank + EXTRA) >= least


def _search(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first triplets as (U S, S, V), by a randomised range finder and power iterations (arXiv:0909.4061).

    Algorithm 4.4 there, iterated until the wanted directions converge.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], rank + EXTRA, generator=generator)
    q, _ = torch.linalg.qr(matrix @ start)
    found = 0.0
    for _ in range(ROUNDS):
        back, _ = torch.linalg.qr(matrix.T @ q)
        q, r = torch.linalg.qr(matrix @ back)
        before, found = found, float(torch.linalg.svdvals(r.double())[:rank].square().sum())
        if found - before <= CHANGE * found:
            break
    u, s, v = torch.linalg.svd((q.T @ matrix).double(), full_matrices=False)
    return (q.double() @ u) * s, s, v


def _all(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All triplets as (U S, S, V), float64."""
    u, s, v = _by_gram(matrix)
    return u * s, s, v


def _product(us: Tensor, s: Tensor, v: Tensor, rank: int, total: float) -> Product:
    us, s, v = us[:, :rank], s[:rank], v[:rank]
    # half to each factor, so that neither is tiny when stored or trained. Triplets at rounding level become zero.
    root = s.sqrt()
    inverse = torch.where(s > 1e-8 * s[:1], 1 / root, 0.0)
    kept = float(s.square().sum())
    return Product((us * inverse).float(), (v * root.unsqueeze(1)).float(), min(kept, total), total)


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
    """`svd` by the eigenvectors of the smaller Gram matrix.

    LAPACK's svd fails if many singular values are equal, as those of stacked bases are. The rounding level is relative
    to `size`, by default the largest singular value.
    """
    u, s, v = (part.to(matrix.dtype) for part in _by_gram(matrix))
    return _significant(u, s, v, s[:1].sum().item() if size is None else size)


def _by_gram(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All triplets, in float64, where squaring loses no float32 precision."""
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = _by_gram(matrix.mT)
        return u.mT, s, v.mT
    exact = matrix.double()
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(exact.mT @ exact))
    s = values.clamp_(min=0).sqrt_()
    u = (exact @ vectors).div_(s.clamp(min=torch.finfo(s.dtype).tiny))
    return u, s, vectors.mT


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition: the polar factor, zero where the matrix has no rank."""
    u, _, v = svd_by_gram(matrix)
    return u @ v


def _significant(u: Tensor, s: Tensor, v: Tensor, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """The triplets above the rounding level (as measured) of a matrix whose largest singular value is `size`."""
    rounding = 4 * torch.finfo(s.dtype).eps * max(len(u), v.shape[1]) ** 0.5
    rank = int((s > rounding * size).sum())
    return u[:, :rank], s[:rank], v[:rank]


def solve(a: Tensor, b: Tensor) -> Tensor:
    """X with A X = B for each of several systems, [..., n, n] and [..., n, m].

    Large ones are solved one by one: MKL's LU of a batch of more than 128 rows fails in torch 2.13 on several threads,
    once their number was set.
    """
    if a.dim() == 2 or a.shape[-1] <= 128:
        x: Tensor = torch.linalg.solve(a, b)
        return x
    return torch.stack([solve(one, other) for one, other in zip(a, b, strict=True)])


def svd_bytes(rows: int, columns: int, itemsize: int = 4) -> int:
    """Bytes that `svd` needs beside its input: a copy, the vectors, and LAPACK's workspace (as measured)."""
    return (2 * rows * columns + 6 * min(rows, columns) ** 2) * itemsize + (1 << 20)


def gram_bytes(rows: int, columns: int) -> int:
    """Bytes that `nearest_orthogonal` needs beside its input: float64 copies, and LAPACK's workspace (as measured)."""
    return (3 * rows * columns + 7 * min(rows, columns) ** 2) * 8 + (1 << 20)
