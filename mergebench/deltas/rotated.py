"""OFT (Qiu et al., arXiv:2306.07280): blocks of a weight's input dimensions, each rotated.

    W' = W R',  R = diag(R_1, ..., R_n),  R_i = (I - Q_i) (I + Q_i)^-1        (embeddings: W' = W R)

Q_i [b, b] is skew-symmetric, its upper triangle is stored row by row. R may be cut off as a Neumann series of k terms,
I + 2 Q + ... + 2 Q^(k-2) + Q^(k-1); it is then only nearly a rotation, and the model was trained with that one. COFT
(section 3.4) shortens each Q_i to a norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import matrix_shape
from mergebench.checkpoint.kind import Misfit, delta_kind
from mergebench.deltas.svd import solve


@dataclass(frozen=True)
class Rotation:
    """skew [n, b (b - 1) / 2], the upper triangles of Q; n is 1 if all blocks share one."""

    skew: Tensor
    terms: int = 0  # of the Neumann series; 0: the inverse itself
    longest: float = 0.0  # |Q_i|, at most; 0: any
    inverse: bool = False  # W R, not W R'


class _Built(Rotation):
    """After `prepare`: R - I [n, b, b] in the place of `skew`."""


def block_size(triangle: int) -> int:
    """b of b (b - 1) / 2."""
    return (1 + math.isqrt(1 + 8 * triangle)) // 2


def cayley(q: Tensor, terms: int = 0) -> Tensor:
    """R - I of skew-symmetric matrices, by the inverse or as a series."""
    if terms == 0:
        identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        return solve(identity + q, -2 * q)  # the two commute
    out, power = torch.zeros_like(q), q
    if terms == 2:
        return 2 * q  # its last term is not halved
    for _ in range(max(terms, 4) - 2 if terms > 1 else 0):  # three terms count as four, as PEFT trains them
        out, power = out + 2 * power, power @ q
    return out + power if terms > 1 else out + 0 * q


def _turns(p: Rotation) -> Tensor:
    """R - I [n, b, b]."""
    size = block_size(p.skew.shape[1])
    rows, columns = torch.triu_indices(size, size, 1, device=p.skew.device)
    q = p.skew.new_zeros(len(p.skew), size, size)
    q[:, rows, columns] = p.skew
    q = q - q.mT
    if p.longest > 0:
        norms = torch.linalg.vector_norm(q, dim=(1, 2), keepdim=True)
        q = torch.where(norms <= p.longest, q, p.longest * (q / norms))
    return cayley(q, p.terms)


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    skew, columns = shapes["skew"], matrix_shape(shape)[1]
    size = block_size(skew[-1]) if len(skew) == 2 else 0
    if size * (size - 1) // 2 != skew[-1]:
        raise ValueError(f"{list(skew)} are no triangles of square blocks")
    if columns % size or skew[0] not in (1, columns // size):
        raise Misfit(f"{skew[0]} blocks of {size} columns")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    size = next((b for b in range(2, columns + 1) if columns % b == 0), 1)
    skew = 0.3 * torch.randn(columns // size, size * (size - 1) // 2, generator=random)
    return {"skew": skew, "terms": 5 if rows == 23 else 0, "longest": 0.2 if rows == 24 else 0.0, "inverse": rows == 1}


@delta_kind(
    paper="arXiv:2306.07280",
    needs_base=True,
    made=lambda shapes, settings, shape: 32 * math.prod(shapes["skew"]),
    prepare=lambda p, base, shape: _Built(_turns(p), inverse=p.inverse),
    check=_check,
    example=_example,
    label=lambda parts, settings: f"blocks of {block_size(parts['skew'].shape[1])}",
)
def rotated(p: Rotation, tile: slice, base: Tensor | None) -> Tensor:
    """W (R - I)' with R of rotated blocks: OFT, COFT."""
    assert base is not None
    turns = p.skew if isinstance(p, _Built) else _turns(p)
    blocks = base.view(len(base), -1, turns.shape[-1]).transpose(0, 1)
    return (blocks @ (turns if p.inverse else turns.mT)).transpose(0, 1).reshape(base.shape)
