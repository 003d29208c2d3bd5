"""What the methods on matrices share: which tensors are matrices to them, and decompositions.

Their papers merge the weights of linear layers. Everything else is averaged: theta_0 + lambda * mean tau_i.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from mergebench.engine.chunks import total
from mergebench.engine.context import Context

# Embeddings (of tokens, positions, patches; T5's `shared` and `relative_attention_bias`), output heads and CLIP's
# projections, by the name of any module on the way: the names of the files, not of the architecture, decide.
_AVERAGED = re.compile(
    r"^output\.|(^|\.)(\w*embed\w*|\w*embs?|wte|wpe|shared|relative_attention_bias"
    r"|(\w+_)?heads?|\w*classifier|cls|score|qa_outputs|vocab_\w+|(text|visual)_projection)(\.|$)"
)


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is merged as a matrix: two dimensions, and no embedding or head."""
    return len(shape) == 2 and not _AVERAGED.search(name)


def matrices(tvs: Tensor, ctx: Context) -> Tensor | None:
    """The chunk as [models, rows, columns]; None where it is of a tensor that is averaged."""
    return tvs.view(len(tvs), *ctx.shape) if is_matrix(ctx.spans[0].tensor, ctx.shape) else None


def mean(tvs: Tensor) -> Tensor:
    return total(tvs) / len(tvs)


def svd(matrix: Tensor, size: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors [m, r], singular values [r], right vectors [r, n], of numerical rank r.

    Triplets at rounding level, compared with `size` (by default the largest singular value), are left out:
    their directions are arbitrary, and where a matrix has fewer than min(m, n) they must not count.
    """
    try:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # LAPACK gives up on rare matrices, hardly ever on both
        u, s, v = (part.mT for part in torch.linalg.svd(matrix.mT, full_matrices=False)[::-1])
    largest = s[:1].sum().item() if size is None else size
    rank = int((s > largest * max(matrix.shape) * torch.finfo(s.dtype).eps).sum())
    return u[:, :rank], s[:rank], v[:rank]


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition: the polar factor, zero where the matrix has no rank."""
    u, _, v = svd(matrix)
    return u @ v


def svd_bytes(rows: int, columns: int, itemsize: int = 4) -> int:
    """What `svd` holds beside its input: a copy, the vectors, and LAPACK's workspace (as measured)."""
    least = min(rows, columns)
    return (2 * rows * columns + 6 * least * least) * itemsize + (1 << 20)
