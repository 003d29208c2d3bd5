"""Low-rank products: compress one without writing it out, or cut a matrix down to one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 512  # up to this many rows or columns, a full decomposition is quick
FIRST = 32  # directions looked for first where the rank is not given
EXTRA = 10  # directions searched beside those wanted
ROUNDS, CHANGE = 60, 1e-7  # the search ends when a round finds so little more energy


class Product(NamedTuple):
    """B @ A, float32, and the squared norms of it and of what it stands for."""

    b: Tensor
    a: Tensor
    kept: float
    total: float


def compress(b: Tensor, a: Tensor, rank: int) -> Product:
    """The best product of `rank` for B @ A (Eckart-Young), found in the factors' own small space.

    With B = Q_b R_b and A' = Q_a R_a, the singular values of B A are those of R_b R_a'.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _product((q_b @ u) * s, s, v @ q_a.T, rank, float(s.square().sum()))


def truncate(matrix: Tensor, rank: int, seed: int = 0) -> Product:
    """The best product of `rank` for a matrix."""
    found = _decompose(matrix) if _needs_all(matrix, rank) else _search(matrix, rank, seed)
    return _product(*found, rank, squared_norm(matrix))


def keep_energy(matrix: Tensor, share: float, seed: int = 0) -> Product:
    """The product of the smallest rank that keeps `share` of a matrix's squared norm.

    More and more directions are looked for; where most would be needed, all are found at once.
    """
    total, rank = squared_norm(matrix), FIRST
    while True:
        everything = _needs_all(matrix, rank)
        us, s, v = _decompose(matrix) if everything else _search(matrix, rank, seed)
        energy = s[: len(s) if everything else rank].double().square()
        enough = torch.nonzero(energy.cumsum(0) >= share * total)
        if len(enough) or everything:
            return _product(us, s, v, int(enough[0]) + 1 if len(enough) else len(s), total)
        # those still to be found are no larger than the last
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

    Algorithm 4.4 there, with as many iterations as it takes for the directions wanted to settle.
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


def _decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All triplets as (U S, S, V), by the smaller Gram matrix: in float64, squaring loses nothing of float32."""
    exact = matrix.double()
    wide = matrix.shape[0] < matrix.shape[1]
    squares, vectors = torch.linalg.eigh(exact @ exact.T if wide else exact.T @ exact)
    s, vectors = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    if not wide:
        return exact @ vectors, s, vectors.T
    v = (vectors.T @ exact) / s.clamp(min=1e-8 * float(s[0]) or 1.0).unsqueeze(1)
    return vectors * s, s, v


def _product(us: Tensor, s: Tensor, v: Tensor, rank: int, total: float) -> Product:
    us, s, v = us[:, :rank], s[:rank], v[:rank]
    # half to each factor: neither is tiny where it is stored or trained on. What has no size is rounding: zero.
    root = s.sqrt()
    inverse = torch.where(s > 1e-8 * s[:1], 1 / root, 0.0)
    kept = float(s.square().sum())
    return Product((us * inverse).float(), (v * root.unsqueeze(1)).float(), min(kept, total), total)
