"""Which tensors the methods on matrices treat as matrices.

Their papers merge the weights of linear layers. Everything else is averaged: theta_0 + lambda * mean tau_i.
"""

from __future__ import annotations

import re
from functools import partial

from mergebench.engine.chunks import total
from mergebench.engine.context import Context
from mergebench.engine.method import Tensor, merge_method

# Embeddings (T5's `shared` and `relative_attention_bias`), heads and CLIP's projections, by any module on the way.
_AVERAGED = re.compile(
    r"^output\.|(^|\.)(\w*embed\w*|\w*embs?|wte|wpe|shared|relative_attention_bias"
    r"|(\w+_)?heads?|\w*classifier|cls|score|qa_outputs|vocab_\w+|(text|visual)_projection)(\.|$)"
)


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is merged as a matrix: two dimensions, and no embedding or head."""
    return len(shape) == 2 and not _AVERAGED.search(name)


def matrices(tvs: Tensor, ctx: Context) -> Tensor | None:
    """The chunk as [models, rows, columns]; None if its tensor is averaged."""
    return tvs.view(len(tvs), *ctx.shape) if is_matrix(ctx.spans[0].tensor, ctx.shape) else None


def mean(tvs: Tensor) -> Tensor:
    return total(tvs) / len(tvs)


matrix_method = partial(merge_method, takes="task_vectors", keeps_base=True, cut="tensor", whole=is_matrix)
