"""Low-rank products: compress one without writing it out, or cut a matrix down to one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 512  # up to this many rows or columns, a full decomposition is quick
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
    return _product(q_b @ u, s, v @ q_a.T, rank, float(s.square().sum()))


def truncate(matrix: Tensor, rank: int) -> Product:
    """The best product of `rank` for a matrix; of a large one, found by subspace iteration (arXiv:0909.4061)."""
    total = float(matrix.double().square().sum())
    least = min(matrix.shape)
    if least <= SMALL or 4 * (rank + EXTRA) >= least:
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        return _product(u, s, v, rank, total)
    generator = torch.Generator().manual_seed(0)
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
    return _product(q.double() @ u, s, v, rank, total)


def _product(u: Tensor, s: Tensor, v: Tensor, rank: int, total: float) -> Product:
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    root = s.sqrt()  # half to each factor: neither is tiny where it is stored or trained on
    kept = float(s.square().sum())
    return Product((u * root).float(), (v * root.unsqueeze(1)).float(), min(kept, total), total)
