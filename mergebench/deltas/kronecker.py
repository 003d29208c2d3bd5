"""LoKr (LyCORIS, arXiv:2309.14859): a Kronecker product.

    W' = W + s C x D;  (C x D)[(i, k), (j, l)] = C[i, j] D[k, l]

C [m, n], D [rows / m, columns / n]. Each is stored whole, or as a product: C = c_b c_a, D = d_b d_a. Of a convolution
in Tucker form D[k, (c, q)] = sum_ij d_b[k, i] t[i, j, q] d_a[j, c].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import matrix_shape
from mergebench.checkpoint.kind import Misfit, delta_kind


@dataclass(frozen=True)
class Kronecker:
    """C, or c_b [m, r] and c_a [r, n]; D, or d_b and d_a, and perhaps t [r, r, kernel]."""

    c: Tensor | None = None
    d: Tensor | None = None
    c_b: Tensor | None = None
    c_a: Tensor | None = None
    d_b: Tensor | None = None
    d_a: Tensor | None = None
    t: Tensor | None = None
    scale: float = 1.0


def _whole(p: Kronecker) -> Kronecker:
    """C and D, multiplied out."""
    c, d = p.c, p.d
    if c is None:
        assert p.c_b is not None and p.c_a is not None
        c = p.c_b @ p.c_a
    if d is None:
        assert p.d_b is not None and p.d_a is not None
        d = p.d_b @ (p.d_a if p.t is None else torch.einsum("ijq,jc->icq", p.t, p.d_a).flatten(1))
    return Kronecker(c, d, scale=p.scale)


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of C and D; `ValueError` if their parts do not multiply."""
    if ("c" in shapes) == ("c_b" in shapes) or ("d" in shapes) == ("d_b" in shapes):
        raise ValueError("each of C and D is needed, whole or as a product")
    made = [_product(shapes, name) for name in "cd"]
    if any(len(one) != 2 for one in made):
        raise ValueError(f"no matrices: {[list(one) for one in made]}")
    return made[0], made[1]


def _product(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    if name in shapes:
        return shapes[name]
    b, a = shapes[f"{name}_b"], shapes.get(f"{name}_a", ())
    t = shapes.get("t") if name == "d" else None
    if len(a) != 2 or len(b) != 2 or b[1] != a[0] or (t is not None and (len(t) != 3 or t[:2] != (a[0], a[0]))):
        raise ValueError(f"factors {list(b)} and {list(a)} do not multiply")
    return b[0], a[1] * (1 if t is None else t[2])


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    c, d = _shapes(shapes)
    if (c[0] * d[0], c[1] * d[1]) != matrix_shape(shape):
        raise Misfit(f"the product makes {[c[0] * d[0], c[1] * d[1]]}")


def _energy(p: Kronecker, shape: tuple[int, ...]) -> float:
    """|C x D|^2 = |C|^2 |D|^2."""
    p = _whole(p)
    assert p.c is not None and p.d is not None
    return float(p.scale**2 * p.c.double().square().sum() * p.d.double().square().sum())


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    if rows > 1 and columns > 1:
        sizes: dict[str, tuple[int, ...]] = {"c": (rows, 1), "d_b": (1, 2), "d_a": (2, columns)}
    elif rows > 1:
        sizes = {"c": (1, columns), "d": (rows, 1)}
    else:
        sizes = {"c_b": (1, 2), "c_a": (2, 3), "d_b": (1, 2), "d_a": (2, 1), "t": (2, 2, columns // 3)}
    return {name: torch.randn(size, generator=random) for name, size in sizes.items()} | {"scale": 0.5}


@delta_kind(
    paper="arXiv:2309.14859",
    prepare=lambda p, base, shape: _whole(p),
    made=lambda shapes, settings, shape: 4 * sum(rows * columns for rows, columns in _shapes(shapes)),
    energy=_energy,
    check=_check,
    example=_example,
)
def kronecker(p: Kronecker, tile: slice, base: Tensor | None) -> Tensor:
    """s C x D, a Kronecker product: LoKr."""
    p = _whole(p)
    assert p.c is not None and p.d is not None
    row = torch.arange(tile.start, tile.stop, device=p.d.device)
    left, right = p.scale * p.c[row // len(p.d)], p.d[row % len(p.d)]
    return (left[:, :, None] * right[:, None, :]).flatten(1)
