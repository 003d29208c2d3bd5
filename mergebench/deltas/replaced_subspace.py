"""DEFT (NeurIPS 2025): a weight's part in a subspace of the outputs is taken out, another one put in; PaRa takes out.

    W' = W + Q (s R - P' W)

`qr`: Q = P = the orthonormal factor of a matrix [out, r]; `relu`: Q is the matrix, P its positive part. R [r, in], none
for PaRa. Given W it is the LoRA of Q and s R - P' W.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import Source, each_tile, matrix_shape
from mergebench.checkpoint.kind import Misfit, delta_kind


@dataclass(frozen=True)
class Subspace:
    """directions [out, r], R [r, in]; columns: the tensor is stored [in, out]."""

    directions: Tensor
    content: Tensor | None = None
    scale: float = 1.0
    relu: bool = False  # else `qr`
    columns: bool = False


class _Built(Subspace):
    """After `prepare`: Q in the place of `directions`, s R - P' W [r, in] in that of `content` (s R if columns)."""


def _sides(p: Subspace) -> tuple[Tensor, Tensor]:
    """Q and P [out, r]."""
    if p.relu:
        return p.directions, torch.relu(p.directions)
    if isinstance(p, _Built):
        return p.directions, p.directions
    q: Tensor = torch.linalg.qr(p.directions.cpu())[0].to(p.directions.device)  # the signs count, LAPACK's are used
    return q, q


def _scaled(p: Subspace, width: int) -> Tensor:
    """s R [r, in]."""
    if p.content is None:
        return p.directions.new_zeros(p.directions.shape[1], width)
    return p.scale * p.content


def _prepare(p: Subspace, base: Source, shape: tuple[int, ...]) -> Subspace:
    """Read W once for P' W, unless its rows are inputs."""
    rows, columns = matrix_shape(shape)
    q, right = _sides(p)
    content = _scaled(p, rows if p.columns else columns)
    if not p.columns:
        product = torch.zeros(content.shape, dtype=torch.float64, device=q.device)
        for tile, values in each_tile(base, shape, q.device):
            product += right[tile].T @ values
        content = content - product.float()
    return _Built(q, content, relu=p.relu, columns=p.columns)


def _exact(p: Subspace, base: Source, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Q and s R - P' W; if columns, both are turned."""
    built = _prepare(p, base, shape)
    assert built.content is not None
    if not p.columns:
        return built.directions, built.content
    right = _sides(built)[1]
    removed = torch.cat([values @ right for _, values in each_tile(base, shape, right.device)])
    return built.content.T - removed, built.directions.T


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    directions, content = shapes["directions"], shapes.get("content")
    out, inner = matrix_shape(shape)[:: -1 if settings["columns"] else 1]
    if len(directions) != 2 or (content is not None and (len(content) != 2 or content[0] != directions[1])):
        raise ValueError(f"directions {list(directions)} and content {list(content or ())} are not of one rank")
    if not settings["relu"] and directions[1] > directions[0]:
        raise ValueError(f"{directions[1]} directions of {directions[0]} outputs cannot be orthogonal")
    if directions[0] != out or (content is not None and content[1] != inner):
        raise Misfit(f"a subspace of {directions[0]} outputs{'' if content is None else f', {content[1]} inputs'}")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    turned = rows in (1, 24)
    out, inner = (columns, rows) if turned else (rows, columns)
    directions = torch.randn(out, min(3, out), generator=random)
    content = torch.randn(directions.shape[1], inner, generator=random)
    parts = {"directions": directions} | ({} if rows == 31 else {"content": content})
    return parts | {"scale": 0.5, "relu": rows == 23, "columns": turned}


@delta_kind(
    paper="DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models (NeurIPS 2025)",
    needs_base=True,
    prepare=_prepare,
    factors=_exact,
    made=lambda shapes, settings, shape: 16 * shapes["directions"][1] * sum(matrix_shape(shape)),
    check=_check,
    example=_example,
    label=lambda parts, settings: f"rank {parts['directions'].shape[1]}",
)
def replaced_subspace(p: Subspace, tile: slice, base: Tensor | None) -> Tensor:
    """Q (s R - P' W): DEFT, PaRa; unprepared, the tile must be all of W."""
    assert base is not None
    q, right = _sides(p)
    if p.columns:
        content = p.content if isinstance(p, _Built) and p.content is not None else _scaled(p, len(base))
        return (content[:, tile].T - base @ right) @ q.T
    if isinstance(p, _Built) and p.content is not None:
        return q[tile] @ p.content
    return q[tile] @ (_scaled(p, base.shape[1]) - right.T @ base)
