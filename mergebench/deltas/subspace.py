"""Intrinsic dimension (Li et al., arXiv:1804.08838; Aghajanyan et al., arXiv:2012.13255): d numbers for a whole model.

    W' = W + s P theta,   P theta = the first D of  H G Pi H B [theta, 0]  / (sqrt(n |G|^2) sqrt(D / n))

Fastfood (Le et al., arXiv:1408.3060). theta [d] is shared by all tensors. D: elements of W. n: the next power of two.
H: the Walsh-Hadamard matrix of n rows, unscaled, in Sylvester's order. B: signs. Pi: a permutation. G: normal numbers.
On average |P theta| = |theta|, whatever the size of W. s is SAID's lambda of this tensor, 1 for DID.

P is a function of the seed and of a name alone. A tensor of fewer than d elements has n < d, and P sees the first n
numbers of theta, as in the authors' code: n numbers reach every change of so small a tensor, such as a bias, and to
refuse would mean a fine-tune without them. The columns of P for d are the first columns of P for any larger d.

[theta, 0] has nothing beyond m = 2^ceil(log2 d), so the first transform is one of m numbers, repeated.

The bits of W' are the same on every platform, whatever the threads: random integers are a hash of a counter, the rest
is IEEE addition, multiplication, division and square root, one operation at a time in a fixed order. Libraries round
log and cos differently, so the normal numbers are Wichura's rational approximation of the inverse distribution (PPND7
of AS 241, Applied Statistics 37, 1988), where the tails need one logarithm, computed as a series.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import matrix_shape
from mergebench.checkpoint.kind import Misfit, delta_kind

BLOCK = 1 << 15  # numbers drawn from one key, and transformed in the cache
LARGEST = 1 << 31  # elements of a tensor: the permutation is computed in 32 bits
GRADIENTS = ("exact", "fairseq")

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32  # a 32-bit finaliser with low bias, by C. Wellons' hash prospector
_STEP = 0x9E3779B9 - 2**32  # 2^32 over the golden ratio: neighbours start far apart
_CENTRE = (5.9109374720e1, 1.5929113202e2, 5.0434271938e1, 3.3871327179), (6.7187563600e1, 7.8757757664e1, 1.7895169469e1, 1.0)  # fmt: skip  # noqa: E501
_TAIL = (1.7023821103e-1, 1.3067284816, 2.7568153900, 1.4234372777), (1.2021132975e-1, 7.3700164250e-1, 1.0)
_LN2 = 0.6931471805599453


@dataclass(frozen=True)
class Subspace:
    """theta [d]; seed and name that P is drawn from; s; how training computes the gradient of theta.

    gradient: `exact`, or `fairseq`, as the authors' code does, 1 / n of it: learning rates published for their code
    belong to that. n depends on the tensor, so it is not one factor. The change itself is the same.
    """

    theta: Tensor
    name: str
    seed: int = 0
    scale: float = 1.0
    gradient: str = "exact"
    signs: Tensor | None = None  # [min(d, n)]: B; computed, not stored
    order: Tensor | None = None  # int32 [n]: Pi modulo m; computed
    gains: Tensor | None = None  # [n]: G times all factors; computed
    rows: int = 0  # of the tensor; computed
    columns: int = 0  # computed


def length(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()


def draw(words: str, start: int, count: int) -> Tensor:
    """Random int32 [count], number `start` onwards, a multiple of `BLOCK`; count: at most `BLOCK`."""
    key = f"{words}\0{start // BLOCK}".encode()
    one, two = struct.unpack("<ii", hashlib.blake2b(key, digest_size=8).digest())
    x = torch.arange(count, dtype=torch.int32).mul_(_STEP)
    x ^= one
    x ^= _shifted(x, 16)
    x *= _FIRST
    x ^= two
    x ^= _shifted(x, 15)
    x *= _SECOND
    x ^= _shifted(x, 16)
    return x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits, as if x had no sign."""
    return (x >> bits).bitwise_and_(0xFFFFFFFF >> bits)


def normal(drawn: Tensor) -> Tensor:
    """Standard normal numbers, float32, of random int32: the inverse distribution at (drawn + 1/2) / 2^32 + 1/2."""
    q = drawn.double().add_(0.5).mul_(2.0**-32)
    out = _ratio(0.180625 - q * q, *_CENTRE).mul_(q)
    (tail,) = torch.where(q.abs() > 0.425)
    q = q[tail]
    far = _ratio((-_log(0.5 - q.abs())).sqrt() - 1.6, *_TAIL)
    out[tail] = torch.where(q < 0, -far, far)
    return out.float()


def _ratio(x: Tensor, above: tuple[float, ...], below: tuple[float, ...]) -> Tensor:
    return _polynomial(x, above).div_(_polynomial(x, below))


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """By Horner's rule, highest power first."""
    out = x * coefficients[0]
    for coefficient in coefficients[1:-1]:
        out.add_(coefficient).mul_(x)
    return out.add_(coefficients[-1])


def _log(x: Tensor) -> Tensor:
    """The natural logarithm, to 1e-10: 2 atanh((f - 1) / (f + 1)) + e ln 2, where x = f 2^e and 1/2 <= f < 1."""
    fraction, exponent = torch.frexp(x)
    t = (fraction - 1) / (fraction + 1)
    series = _polynomial(t * t, tuple(1 / (2 * k + 1) for k in reversed(range(10))))
    return exponent.double() * _LN2 + 2 * t * series


def permuted(words: str, start: int, count: int, of: int) -> Tensor:
    """Where a permutation of `of` numbers, a power of two, takes number `start` onwards from: int32 [count].

    Four rounds of a product with an odd number modulo `of` and a shift, which can both be undone: one to one without a
    table. Sorting random numbers would take a hundred times as long.
    """
    keys = struct.unpack("<8i", hashlib.blake2b(words.encode(), digest_size=32).digest())
    half = (of.bit_length() + 1) // 2
    x = torch.arange(start, start + count, dtype=torch.int32)
    for factor, added in zip(keys[::2], keys[1::2], strict=True):
        x.mul_(factor | 1).add_(added).bitwise_and_(of - 1)
        x ^= x >> half
    return x


def _halved(x: Tensor) -> Tensor:
    """The sum of 2^k numbers in a fixed order: the halves are added up until one number is left."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def transformed(x: Tensor) -> Tensor:
    """H x, for x [2^k]: unscaled, Sylvester's order. Its own inverse times 2^k. O(n log n), one addition at a time.

    H of a b numbers is H of b on the rows of [a, b], then H of a on its columns: so all but the largest stages are in
    the cache, and every stage runs along contiguous rows.
    """
    out = x.clone()
    blocks = out.view(-1, min(len(x), BLOCK))
    for block in blocks:
        rows = block.view(-1, length(math.isqrt(len(block))))
        across = _butterflies(rows.T.contiguous())
        rows.copy_(_butterflies(across.T.contiguous()))
    if len(blocks) > 1:
        width = max(BLOCK // len(blocks), 64)
        for first in range(0, BLOCK, width):
            columns = blocks[:, first : first + width]
            columns.copy_(_butterflies(columns.contiguous()))
    return out


def _butterflies(x: Tensor) -> Tensor:
    """H times x [2^k, columns], in its place."""
    apart = 1
    while apart < len(x):
        a, b = x.view(len(x) // (2 * apart), 2, -1).unbind(1)
        difference = a - b
        a += b
        b.copy_(difference)
        apart *= 2
    return x


class _Transform(torch.autograd.Function):
    """H x, with the gradient times `share`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        """H x."""
        ctx.share = share
        return transformed(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        """H is symmetric."""
        slope = _Transform.apply(slopes[0], ctx.share)  # type: ignore[no-untyped-call]
        return slope * ctx.share, None


def fastfood(theta: Tensor, signs: Tensor, order: Tensor, gains: Tensor, share: float = 1.0) -> Tensor:
    """All n numbers of H diag(gains) Pi H B [theta, 0]; share: of the gradient that each H passes on."""
    used = len(signs)
    small = theta.new_zeros(min(length(len(theta)), len(gains)))
    small = torch.cat([theta[:used] * signs, small[used:]])
    mixed = _Transform.apply(small, share).index_select(0, order)  # type: ignore[no-untyped-call]
    out: Tensor = _Transform.apply(mixed * gains, share)  # type: ignore[no-untyped-call]
    return out


def scaled(normals: Tensor, count: int, scale: float = 1.0) -> Tensor:
    """G [n] times all factors of a tensor of `count` elements."""
    squares = torch.stack([_halved(block.double().square()) for block in torch.split(normals, BLOCK)])
    n = len(normals)
    factor = scale / (math.sqrt(n * float(_halved(squares))) * math.sqrt(count / n))
    return normals * torch.tensor(factor, dtype=torch.float32)


def prepared(p: Subspace, shape: tuple[int, ...]) -> Subspace:
    """With B, Pi and G drawn, on theta's device, for a tensor of this shape."""
    device, count = p.theta.device, math.prod(shape)
    n, words = length(count), f"{p.seed}\0{p.name}"
    period = min(length(len(p.theta)), n)
    order, normals = torch.empty(n, dtype=torch.int32), torch.empty(n)
    signs = torch.empty(min(len(p.theta), n))
    for start in range(0, n, BLOCK):
        here = slice(start, min(start + BLOCK, n))
        size = here.stop - here.start
        order[here] = permuted(f"{words}\0order", start, size, n) & (period - 1)
        normals[here] = normal(draw(f"{words}\0normal", start, size))
        if start < len(signs):
            sign = draw(f"{words}\0sign", start, min(size, len(signs) - start))
            signs[start : start + len(sign)] = 1 - 2 * (sign < 0).float()
    rows, columns = matrix_shape(shape)
    signs, order, gains = (one.to(device) for one in (signs, order, scaled(normals, count, p.scale)))
    return replace(p, signs=signs, order=order, gains=gains, rows=rows, columns=columns)


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    theta, scale = shapes["theta"], settings["scale"]
    if len(theta) != 1 or not theta[0]:
        raise ValueError(f"theta {list(theta)} is no vector")
    if not isinstance(settings["seed"], int) or not isinstance(settings["name"], str):
        raise ValueError("a seed that is no whole number, or a name that is no word")
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"a scale of {scale}")
    if settings["gradient"] not in GRADIENTS:
        raise ValueError(f"gradient '{settings['gradient']}': {' or '.join(GRADIENTS)}")
    if not 0 < math.prod(shape) <= LARGEST:
        raise Misfit(f"a subspace of {math.prod(shape)} elements: 1 to 2^31 are possible")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    return {"theta": torch.randn(20, generator=random), "name": "layer.weight", "seed": 3, "scale": 0.5}


@delta_kind(
    paper="arXiv:2012.13255",
    whole=True,
    prepare=lambda p, base, shape: prepared(p, shape),
    # order and gains, what the transform reads and writes, one more while it is made
    made=lambda shapes, settings, shape: 5 * 4 * length(math.prod(shape)) + 2 * 4 * shapes["theta"][0],
    check=_check,
    example=_example,
    label=lambda parts, settings: f"of {parts['theta'].numel} dimensions",
)
def subspace(p: Subspace, tile: slice, base: Tensor | None) -> Tensor:
    """s P theta with one theta for all tensors, P drawn from a seed: intrinsic dimension."""
    assert p.signs is not None and p.order is not None and p.gains is not None
    share = 1 / math.sqrt(len(p.gains)) if p.gradient == "fairseq" else 1.0
    change = fastfood(p.theta, p.signs, p.order, p.gains, share)
    if not change.requires_grad:
        change.masked_fill_(change == 0, -0.0)  # adding -0.0 changes no bit
    return change[: p.rows * p.columns].view(p.rows, p.columns)[tile]
