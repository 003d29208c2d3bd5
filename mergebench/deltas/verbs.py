"""Operations on any delta: write it out, measure it, convert it to low rank.

The operations know no kind. A kind may declare a faster way (`energy`, `factors`), which is tested against the slow
one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergebench.checkpoint.delta import Delta, Folded, Source, matrix_shape
from mergebench.checkpoint.header import Reader
from mergebench.checkpoint.kind import StoredDelta
from mergebench.deltas import low_rank, svd
from mergebench.deltas.low_rank import Factors
from mergebench.errors import ModelError

CPU = torch.device("cpu")


class Size(NamedTuple):
    """The size of deltas on disk."""

    nbytes: int
    parameters: int


class Converted(NamedTuple):
    """A delta of another kind: its parts in memory, the share of the squared norm that it keeps, and that norm."""

    parts: Any
    kept: float
    total: float


class Nothing:
    """A base of zeros, for deltas that do not depend on the base."""

    def read(self, start: int, out: Tensor) -> None:
        out.zero_()


def size(deltas: Sequence[Delta]) -> Size:
    """Stored bytes and numbers; a part shared by several deltas counts once."""
    stored = {(info.file, info.offset): info for delta in deltas for info in delta.stored}.values()
    return Size(sum(info.nbytes for info in stored), sum(info.numel for info in stored))


def materialise(files: Reader, delta: Delta, base: Source | None = None) -> Tensor:
    """W' - W written out, float32 of the tensor's shape; `base` gives W, for a delta that depends on it."""
    out = torch.zeros(delta.shape)
    flat, at = out.view(-1), 0
    for piece in pieces(files, delta, base):
        flat[at : at + len(piece)] = piece
        at += len(piece)
    return out


def pieces(files: Reader, delta: Delta, base: Source | None = None) -> Iterator[Tensor]:
    """W' - W tile by tile, flat."""
    folded = Folded(files, CPU, _base(delta, base), delta)
    numel = matrix_shape(delta.shape)[0] * matrix_shape(delta.shape)[1]
    step = max(folded.rows * matrix_shape(delta.shape)[1], 1)
    for start in range(0, numel, step):
        piece = torch.zeros(min(step, numel - start))
        folded.add_into(start, piece)
        yield piece


def energy(files: Reader, delta: Delta, base: Source | None = None) -> float:
    """|W' - W|^2: in closed form if the kind has one, else summed over the tiles in float64."""
    exact = closed_energy(files, delta)
    if exact is not None:
        return exact
    return sum((float(piece.double().square().sum()) for piece in pieces(files, delta, base)), 0.0)


def closed_energy(files: Reader, delta: Delta) -> float | None:
    """|W' - W|^2 if the kind has a closed form."""
    if isinstance(delta, StoredDelta) and delta.of.energy is not None:
        return delta.of.energy(delta.load(files, CPU), delta.shape)
    return None


def exact_factors(files: Reader, delta: Delta, base: Source | None = None) -> tuple[Tensor, Tensor] | None:
    """B and A with W' - W = B A, if the kind has such factors; `base` gives W, for a kind that depends on it."""
    if isinstance(delta, StoredDelta) and delta.of.factors is not None:
        return delta.of.factors(delta.load(files, CPU), _base(delta, base), delta.shape)
    return None


def as_low_rank(
    files: Reader,
    delta: Delta,
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: Source | None = None,
    seed: int = 0,
) -> Converted:
    """Convert a delta on a matrix to low rank.

    The conversion is exact if the kind has factors and neither a smaller `rank` nor an `energy` is asked for. Else
    it is the best approximation by `rank`, or by the smallest rank that keeps `energy`, a share of the squared norm
    (Eckart-Young), for which one matrix is written out.

    Raises `ModelError` if the tensor is no matrix, or `rank` or `energy` is needed and not given.
    """
    exact = exact_factors(files, delta, base)
    if exact is not None and energy is None:
        b, a = exact
        if rank is None or rank >= min(b.shape):
            factors = Factors(b, a)
            return Converted(factors, 1.0, low_rank.energy(factors, delta.shape))
        product = svd.compress(b, a, rank)
    elif len(delta.shape) != 2:
        raise ModelError(f"{delta.describe()}: {list(delta.shape)} is no matrix, and low-rank deltas are on matrices")
    elif energy is not None:
        product = svd.keep_energy(materialise(files, delta, base), energy, seed)
    elif rank is None:
        raise ModelError(
            f"{delta.describe()} has no exact low-rank form", "truncate it: a rank, or a share of the energy to keep"
        )
    else:
        product = svd.truncate(materialise(files, delta, base), min(rank, *delta.shape), seed)
    kept = product.kept / product.total if product.total else 1.0
    return Converted(Factors(product.b, product.a), kept, product.total)


def _base(delta: Delta, base: Source | None) -> Source:
    if base is None and delta.needs_base:
        raise ModelError(f"{delta.kind}: what it changes depends on the base's weights", "give the base")
    return Nothing() if base is None else base
