"""P theta of many tensors at once, and the gradient, as a step of training needs them.

The numbers are those of `deltas/subspace.py` but for rounding: there every addition has its place, so that a file means
the same bits everywhere; here H is a product of small matrices,

    H of a b numbers, as a matrix [a, b], is H_a X H_b

in pieces that stay in the cache, and what follows or precedes it is done to a piece while it is there. Tensors with the
same n share one call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mergebench.deltas.subspace import Subspace

SIDE = 32  # of the largest matrix that is multiplied with
ROW = SIDE * SIDE  # numbers that two products transform
PIECE = 1 << 16  # numbers of a piece


class Fastfood:
    """P_1 to P_k of tensors with the same n, and which of all lambdas are theirs."""

    def __init__(self, drawn: Sequence[Subspace], d: int, places: Sequence[int] | None = None) -> None:
        self.shapes = [(p.rows, p.columns) for p in drawn]
        self.places = torch.tensor(range(len(drawn)) if places is None else places)
        signs, orders, gains = ([getattr(p, name) for p in drawn] for name in ("signs", "order", "gains"))
        self.d, self.n = d, len(gains[0])
        self.signs = torch.stack(signs)  # [k, min(d, n)]
        self.period = 1 << (self.signs.shape[1] - 1).bit_length()
        self.gains = torch.cat(gains)  # [k n]
        self.order = torch.cat([one + place * self.period for place, one in enumerate(orders)])  # into [k period]

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        for name in ("signs", "gains", "order", "places"):
            setattr(self, name, getattr(self, name).to(device))

    def __call__(self, theta: Tensor, lambdas: Tensor, share: float = 1.0) -> tuple[Tensor, ...]:
        """lambda_i P_i theta, each in its tensor's shape as a matrix; share: of theta's gradient that is passed on.

        Nothing is kept that a backward pass frees: one call serves several.
        """
        out: tuple[Tensor, ...] = _Product.apply(theta, lambdas, self, share)  # type: ignore[no-untyped-call]
        return out

    def product(self, theta: Tensor, lambdas: Tensor) -> Tensor:
        """[k, n], for these k lambdas."""
        used = self.signs.shape[1]
        small = theta.new_zeros(len(self.signs), self.period)
        small[:, :used] = theta[:used] * self.signs * lambdas[:, None]
        small = transformed(small).view(-1)
        out = theta.new_empty(len(self.signs), self.n)
        flat = out.view(-1)
        for piece in _pieces(len(flat), self.n):
            mixed = small.index_select(0, self.order[piece]) * self.gains[piece]
            flat[piece] = _along_rows(mixed, self.n)
        return _along_columns(out)

    def transposed(self, slopes: Sequence[Tensor | None]) -> Tensor:
        """P_i' of k matrices [k, d]; None: zeros."""
        like = next(one for one in slopes if one is not None)
        wide = like.new_zeros(len(slopes), self.n)
        for row, slope in zip(wide, slopes, strict=True):
            if slope is not None:
                row[: slope.numel()] = slope.reshape(-1)
        flat = _along_columns(wide).view(-1)
        small = like.new_zeros(len(slopes) * self.period)
        for piece in _pieces(len(flat), self.n):
            small.index_add_(0, self.order[piece], _along_rows(flat[piece], self.n) * self.gains[piece])
        out = like.new_zeros(len(slopes), self.d)
        used = self.signs.shape[1]
        out[:, :used] = transformed(small.view(len(slopes), -1))[:, :used] * self.signs
        return out


class _Product(torch.autograd.Function):
    """lambda_i P_i theta: linear in theta and in lambda, so that nothing is kept but these."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, lambdas: Tensor, fastfood: Fastfood, share: float) -> tuple[Tensor, ...]:
        ctx.of, ctx.fastfood, ctx.share = (theta.detach().clone(), lambdas.detach().clone()), fastfood, share
        ctx.set_materialize_grads(False)
        with torch.autocast(theta.device.type, enabled=False):
            out = fastfood.product(theta, lambdas[fastfood.places])
        return tuple(
            row[: rows * columns].view(rows, columns) for row, (rows, columns) in zip(out, fastfood.shapes, strict=True)
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        theta, lambdas = ctx.of
        if all(slope is None for slope in slopes):
            return None, None, None, None
        with torch.autocast(theta.device.type, enabled=False):
            back = ctx.fastfood.transposed(slopes)
        places = ctx.fastfood.places
        along = torch.zeros_like(lambdas).index_copy_(0, places, back @ theta)
        return ctx.share * (lambdas[places] @ back), along, None, None


def transformed(x: Tensor) -> Tensor:
    """H of each row of x [k, n]."""
    out = torch.empty_like(x)
    flat, given = out.view(-1), x.reshape(-1)
    for piece in _pieces(len(flat), x.shape[1]):
        flat[piece] = _along_rows(given[piece], x.shape[1])
    return _along_columns(out)


def _pieces(count: int, n: int) -> Iterator[slice]:
    """Slices of whole rows of n numbers, or of their parts of `ROW` numbers."""
    size = max(PIECE // n, 1) * n if n <= ROW else PIECE
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def _along_rows(x: Tensor, n: int) -> Tensor:
    """H of each n numbers, or of each `ROW` of them, flat."""
    width = min(n, ROW)
    right = 1 << (width.bit_length() // 2)
    left = width // right
    out = _matrix(left, x.dtype, x.device) @ x.view(-1, left, right)
    return (out.view(-1, right) @ _matrix(right, x.dtype, x.device)).view(-1)


def _along_columns(x: Tensor) -> Tensor:
    """What is left of H after `_along_rows`, for x [k, n] in its place."""
    if x.shape[1] <= ROW:
        return x
    high = x.shape[1] // ROW
    width = min(max(PIECE // high, 16), ROW)
    for one in x.view(len(x), high, ROW):
        for first in range(0, ROW, width):
            columns = one[:, first : first + width]
            out = columns.contiguous()
            done = 1
            while done < high:
                side = min(SIDE, high // done)
                out = _matrix(side, x.dtype, x.device) @ out.view(done, side, -1)
                done *= side
            columns.copy_(out.view(high, width))
    return x


@lru_cache(maxsize=64)
def _matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """H of n numbers, in Sylvester's order."""
    out = torch.ones(1, 1, dtype=dtype)
    for _ in range(int(math.log2(n))):
        out = torch.cat([torch.cat([out, out], 1), torch.cat([out, -out], 1)])
    return out.to(device)
