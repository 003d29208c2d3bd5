"""LoRA (Hu et al., arXiv:2106.09685), and its variants that differ in a scale: rsLoRA, AdaLoRA.

    W' = W + s B diag(E) A

B [rows, r], A [r, columns]; s = alpha / r (rsLoRA, arXiv:2312.03732: alpha / sqrt(r)); E [r] is AdaLoRA's
(arXiv:2303.10512, eq. 3), ones elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import Source, matrix_shape
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.kind import Misfit, delta_kind


@dataclass(frozen=True)
class Factors:
    """B [rows, r], A [r, columns], E [r] or [r, 1]."""

    b: Tensor
    a: Tensor
    e: Tensor | None = None
    scale: float = 1.0


def factors(p: Factors) -> tuple[Tensor, Tensor]:
    """B and A, with the scale and E multiplied into B."""
    return (p.scale * p.b if p.e is None else p.scale * p.b * p.e.ravel()), p.a


def energy(p: Factors, shape: tuple[int, ...]) -> float:
    """|B A|^2 = <B'B, A A'>, in float64."""
    b, a = (part.double() for part in factors(p))
    return max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0)


def some_factors(shape: tuple[int, ...], random: torch.Generator, rank: int = 2) -> dict[str, Any]:
    """B and A for a tensor of this shape, and a scale, as a start for examples of kinds on factors."""
    rows, columns = matrix_shape(shape)
    b, a = torch.randn(rows, rank, generator=random), torch.randn(rank, columns, generator=random)
    return {"b": b, "a": a, "scale": 0.5}


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    """An example, with E if there is more than one row."""
    parts = some_factors(shape, random, rank=3)
    return parts | ({"e": torch.randn(3, generator=random)} if shape[0] > 1 else {})


def label(parts: Mapping[str, TensorInfo], settings: Mapping[str, Any]) -> str:
    """The rank of the factors."""
    return f"rank {min(parts['b'].shape)}"


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """Check that the factors multiply to a matrix of this shape."""
    b, a, (rows, columns) = shapes["b"], shapes["a"], matrix_shape(shape)
    if len(b) != 2 or len(a) != 2 or b[1] != a[0] or shapes.get("e", b[1:]) not in (b[1:], (*b[1:], 1)):
        raise ValueError(f"factors {list(b)} and {list(a)} do not multiply")
    if (b[0], a[1]) != (rows, columns):
        raise Misfit(f"the factors make {[b[0], a[1]]}")


def _fold(p: Any, tile: slice, base: Tensor) -> Tensor:
    return base.addmm_(p.b[tile], p.a)  # the product is never written to memory


def made_by(
    make: Callable[[Any], tuple[Tensor, Tensor]],
    rank: Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any]], int],
) -> dict[str, Any]:
    """Arguments of `delta_kind` for a kind whose difference is some B A: made once, then folded as a LoRA is.

    make: B and A of the stored tensor, from the parts. rank: theirs, from shapes and settings.
    """

    def prepare(p: Any, base: Source, shape: tuple[int, ...]) -> Factors:
        b, a = make(p)
        return Factors(b.contiguous(), a.contiguous())

    def label(parts: Mapping[str, TensorInfo], settings: Mapping[str, Any]) -> str:
        return f"rank {rank({name: info.shape for name, info in parts.items()}, settings)}"

    return {
        "prepare": prepare,
        "folds": _fold,
        "energy": lambda p, shape: energy(Factors(*make(p)), shape),
        "factors": lambda p, base, shape: make(p),
        "made": lambda shapes, settings, shape: 4 * rank(shapes, settings) * sum(matrix_shape(shape)),
        "label": label,
    }


def rows(p: Any, tile: slice, make: Callable[[Any], tuple[Tensor, Tensor]]) -> Tensor:
    """Rows of B A, made once or of the parts as they are stored."""
    b, a = (p.b, p.a) if isinstance(p, Factors) else make(p)
    return b[tile] @ a


@delta_kind(
    paper="arXiv:2106.09685",
    prepare=lambda p, base, shape: Factors(*factors(p)),  # scaled once, not tile by tile
    folds=_fold,
    energy=energy,
    factors=lambda p, base, shape: factors(p),
    example=_example,
    check=check,
    label=label,
)
def low_rank(p: Factors, tile: slice, base: Tensor | None) -> Tensor:
    """s B diag(E) A: LoRA, rsLoRA by its scale, AdaLoRA by E."""
    b = p.b[tile] if p.scale == 1 else p.scale * p.b[tile]
    return (b if p.e is None else b * p.e.ravel()) @ p.a
