"""Chunks of work: large tensors are cut, small neighbours that are read and stored alike share a chunk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mergebench.checkpoint.delta import matrix_shape, tile_rows
from mergebench.engine.noise import TILE
from mergebench.engine.plan import Plan
from mergebench.engine.span import Span

COPIED = 16 * TILE  # elements of a copied piece
SMALL = 1 << 14  # elements of a tensor that may share a chunk: more take longer than handing out a chunk
MOST = 64  # tensors in a chunk, so that workers end at about the same time


class Item(NamedTuple):
    """One chunk of work: elements of the unit numbered `unit` (-1: to be copied), starting at its tile `tile`.

    With several spans, each is a whole tensor; at tensor scope they are of the units `unit`, `unit + 1`, ...
    """

    unit: int
    spans: tuple[Span, ...]
    tile: int


def items_of(plan: Plan, tensors: Iterable[tuple[str, int]], apply: bool = False) -> Iterator[Item]:
    """Merged tensors, each with the number of its unit, in chunks. With `apply`, also copied tensors (unit -1)."""
    infos, step = plan.merge.reference.tensors, int(plan.merge.scope == "tensor")
    shared: list[Span] = []  # with the first one's unit and tile, how they are read, their size, and the next unit
    unit, first, way, size, following = 0, 0, None, 0, 0
    tile = last = 0
    for name, number in tensors:
        if number < 0:
            yield from copies_of(plan, name)
            continue
        numel = infos[name].numel
        tile, last = (tile if number == last else 0), number
        own = plan.way(name) if numel <= SMALL else None
        fits = own == way and number == following and size + numel <= plan.chunk and len(shared) < MOST
        if shared and not (fits and own is not None):
            yield Item(unit, tuple(shared), first)
            shared = []
        if own is None or numel > plan.chunk:
            yield from chunks_of(plan, name, number, tile, apply)
        else:
            if not shared:
                unit, first, way, size = number, tile, own, 0
            shared.append(Span(name, 0, numel))
            size, following = size + numel, number + step
        tile += -(-numel // TILE)
    if shared:
        yield Item(unit, tuple(shared), first)


def chunks_of(plan: Plan, name: str, unit: int, tile: int = 0, apply: bool = False) -> Iterator[Item]:
    """A merged tensor in chunks; `tile` is the number of its first tile in the unit."""
    info, size = plan.merge.reference.tensors[name], plan.chunk
    if apply and name in plan.encoded.tensors and name not in plan.whole:
        size = plan.piece(name)
    elif plan.merge.cut == "row":
        columns = info.shape[-1] if info.shape else 1
        size = max(size // max(columns, 1), 1) * columns
    elif name in plan.whole:
        size = info.numel
    elif apply and any(operand.deltas for operand in plan.operands[name]):  # so that no tile is computed by two workers
        step = math.lcm(tile_rows(info.shape) * matrix_shape(info.shape)[1], 8)  # a byte of a mask has 8 elements
        size = size // step * step or size
    for start in range(0, info.numel, size):
        yield Item(unit, (Span(name, start, min(start + size, info.numel)),), tile + start // TILE)


def copies_of(plan: Plan, name: str) -> Iterator[Item]:
    """A copied tensor in pieces; a zero difference needs none, since files start as zeros."""
    numel = plan.merge.reference.tensors[name].numel if name in plan.copied else 0
    size = plan.piece(name) if name in plan.encoded.tensors else COPIED
    for start in range(0, numel, size):
        yield Item(-1, (Span(name, start, min(start + size, numel)),), 0)
