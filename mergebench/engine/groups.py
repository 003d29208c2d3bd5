"""Which tensors one set of statistics covers, and which are swept together before any is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mergebench.checkpoint.shards import Shard
from mergebench.engine.brackets import BYTES, LEAST_NEW
from mergebench.engine.job import Merge, Operand

GROUP = 2 << 30  # bytes of input per group at tensor scope: still in the page cache at the second sweep


class Unit(NamedTuple):
    """The tensors that one set of statistics covers: a single tensor, or all."""

    tensors: tuple[str, ...]
    numel: int
    passes: int  # questions asked about it


@dataclass(frozen=True)
class Group:
    """Units swept together, and the tensors written afterwards, merged or copied, in the output's order."""

    units: tuple[Unit, ...]
    written: tuple[str, ...]


def grouped(
    merge: Merge,
    operands: Mapping[str, Sequence[Operand]],
    shards: Sequence[Shard],
    asked: Mapping[str, int],
    room: int,
) -> list[Group]:
    """Group the tensors: at model scope all together; else so few that statistics fit into `room` bytes (small tensors
    are gathered whole) and inputs into the page cache, since each phase waits for all."""
    infos = merge.reference.tensors
    order = [[tensor.name for tensor in shard.tensors] for shard in shards]
    if merge.scope == "model":
        names = [name for shard in order for name in shard]
        reached = tuple(name for name in names if name in asked)
        numel = sum(infos[name].numel for name in reached)
        return [Group((Unit(reached, numel, asked[reached[0]]),), tuple(names))]
    groups = []
    for shard in order:
        batch: list[str] = []
        size = held = 0
        for name in shard:
            reads = infos[name].nbytes + sum(o.stored.nbytes for o in operands.get(name, ()) if o.stored is not None)
            holds = len(merge.models) * BYTES * min(infos[name].numel, 2 * LEAST_NEW) if asked.get(name) else 0
            if batch and (size + reads > GROUP or held + holds > room):
                groups.append(batch)
                batch, size, held = [], 0, 0
            batch.append(name)
            size, held = size + reads, held + holds
        groups.append(batch)
    return [
        Group(tuple(Unit((name,), infos[name].numel, asked[name]) for name in batch if name in asked), tuple(batch))
        for batch in groups
    ]
