"""GraLoRA (arXiv:2505.20355): the weight in n x n blocks, a low-rank change of its own in each.

    W'[k, m] = W[k, m] + s B[k, m] A[k, m]

The block in row k and column m of blocks has the rank r / n. Stored are b [n, r, out / n] and a [n, in / n, r], with
B[k, m] = b[k, of m]' and A[k, m] = a[m, :, of k]', where "of j" are the j-th r / n of the r. The hybrid form adds a
low-rank change of the whole, general_b [out, h] and general_a [h, in].
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
from mergebench.deltas import low_rank


@dataclass(frozen=True)
class Blocks:
    """b [n, r, out / n], a [n, in / n, r], general_b [out, h], general_a [h, in]."""

    b: Tensor
    a: Tensor
    general_b: Tensor | None = None
    general_a: Tensor | None = None
    scale: float = 1.0
    columns: bool = False  # outputs are columns of the stored tensor


def factors(p: Blocks) -> tuple[Tensor, Tensor]:
    """B and A of rank n r + h; a block of them has one row of blocks of the weight, and mostly zeros."""
    n, inner, r = p.a.shape
    b: Tensor = torch.block_diag(*p.b.mT)  # type: ignore[no-untyped-call]  # columns: k, m, and the rank in the block
    one = torch.eye(n, dtype=p.a.dtype, device=p.a.device)
    a = torch.einsum("miks,mj->kmsji", p.a.view(n, inner, n, r // n), one).reshape(n * r, n * inner)
    if p.general_b is not None and p.general_a is not None:
        b, a = torch.cat([b, p.general_b], 1), torch.cat([a, p.general_a])
    b = p.scale * b
    return (a.T, b.T) if p.columns else (b, a)


def _rank(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> int:
    n, r, _ = shapes["b"]
    return n * r + (shapes["general_a"][0] if "general_a" in shapes else 0)


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    b, a = shapes["b"], shapes["a"]
    if len(b) != 3 or len(a) != 3 or b[0] != a[0] or b[1] != a[2] or not b[0] or b[1] % b[0]:
        raise ValueError(f"{list(b)} and {list(a)} are no factors of blocks")
    rows, columns = matrix_shape(shape)[:: -1 if settings["columns"] else 1]
    if (b[0] * b[2], a[0] * a[1]) != (rows, columns):
        raise Misfit(f"the blocks make {[b[0] * b[2], a[0] * a[1]]}")
    general_b, general_a = shapes.get("general_b", (rows, 0)), shapes.get("general_a", (0, columns))
    if len(general_a) != 2 or general_b != (rows, general_a[0]) or general_a[1] != columns:
        raise ValueError(f"general factors {list(general_b)} and {list(general_a)} do not fit the blocks")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    n, turned = math.gcd(rows, columns), columns == 1
    out, inner = (columns, rows) if turned else (rows, columns)
    parts: dict[str, Any] = {
        "b": torch.randn(n, 2 * n, out // n, generator=random),
        "a": torch.randn(n, inner // n, 2 * n, generator=random),
        "scale": 0.5,
        "columns": turned,
    }
    if rows == 1:
        return parts
    general = {
        "general_b": torch.randn(out, 2, generator=random),
        "general_a": torch.randn(2, inner, generator=random),
    }
    return parts | general


@delta_kind(
    paper="arXiv:2505.20355",
    check=_check,
    example=_example,
    **low_rank.made_by(factors, _rank),
)
def blocks(p: Blocks, tile: slice, base: Tensor | None) -> Tensor:
    """s B[k, m] A[k, m] in every block: GraLoRA."""
    return low_rank.rows(p, tile, factors)
