"""Turn a resolved merge into a plan: what is read, asked and written, and in how much memory.

Reads headers only. Every error that is detectable before the first tensor is read is raised here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from mergebench.checkpoint import mismatch
from mergebench.checkpoint.align import Alignment, align
from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.encode import Eight
from mergebench.checkpoint.encoded import Encoded
from mergebench.checkpoint.header import FP8, TensorInfo
from mergebench.checkpoint.naming import USUAL
from mergebench.checkpoint.shards import Shard, lay_out
from mergebench.checkpoint.values import split
from mergebench.deltas.formats.emr import with_tasks
from mergebench.engine import on_data, trace
from mergebench.engine.brackets import BYTES
from mergebench.engine.checks import check_memory, check_models, encoded_of
from mergebench.engine.cluster import Cluster
from mergebench.engine.groups import Group, grouped
from mergebench.engine.job import Merge, Operand, operands_of, stored_type
from mergebench.engine.machine import check_descriptors, cores, device_of
from mergebench.engine.noise import TILE
from mergebench.engine.sizes import buffer_bytes, chunk_size, least_chunk, temporary_bytes
from mergebench.errors import RecipeError, counted, human

MB = 10**6
DEFAULT_MEMORY = 400 * MB
SHARD_SIZE = 4_000_000_000
SEVERAL = 4  # groups of a chunk that the file has turned: each row of a group is a write
ENCODING = 48  # bytes that rounding to eight or four bits takes for each element of a chunk
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Plan:
    """How a merge will be done. Everything here is known from headers."""

    merge: Merge
    alignment: Alignment
    operands: dict[str, tuple[Operand, ...]]
    dtypes: dict[str, str]  # stored type of every tensor of the output
    shards: list[Shard]
    groups: list[Group]
    asked: dict[str, int]  # questions about each merged tensor
    asked_of_all: bool  # the last question is about all tensors together, at any scope
    blind: bool  # the method may see several tensors as one
    chunk: int  # elements
    whole: frozenset[str]  # tensors that come in one chunk, however large
    workers: int  # of a cluster, on the machine that has the most
    memory: int  # bytes for buffers and statistics, on each machine
    device: torch.device
    cluster: Cluster = ()  # empty: this machine alone
    encoded: Encoded = Encoded()  # what is written in eight or four bits

    def __repr__(self) -> str:
        models = counted(len(self.merge.models), "model")
        return (
            f"<Plan: {self.merge.method.name} of {models}, {self.elements:,} elements, {counted(self.sweeps, 'sweep')}>"
        )

    @cached_property
    def on_data(self) -> on_data.Found:
        """The models' statistics of each merged tensor that has some."""
        return on_data.find(self.merge, self.alignment.sources)

    @cached_property
    def passes(self) -> int:
        """Questions the method asks, at most."""
        return max(self.asked.values(), default=0)

    @cached_property
    def sweeps(self) -> int:
        """Times a chunk is read, at most: once for each question, and once to apply."""
        return max((self.sweeps_to_ask(name) for name in self.asked), default=0) + 1

    def is_one_tile(self, name: str) -> bool:
        """Whether a tensor is a unit of one tile, in one chunk: all questions about it are answered in one visit."""
        return self.merge.scope == "tensor" and self.merge.reference.tensors[name].numel <= min(TILE, self.chunk)

    def sweeps_to_ask(self, name: str) -> int:
        """Sweeps over a tensor before the one that applies; what is of one tile is asked about where it is merged."""
        asked = self.asked[name]
        return min(asked, int(self.asked_of_all)) if asked and self.is_one_tile(name) else asked

    @property
    def elements(self) -> int:
        return sum(self.merge.reference.tensors[name].numel for name in self.alignment.merged)

    @property
    def bytes_written(self) -> int:
        return sum(file.nbytes for shard in self.shards for file in shard.files)

    @cached_property
    def copied(self) -> frozenset[str]:
        """Tensors whose data are copied from the base; if a task vector is written, only those without a difference."""
        tensors, model = self.merge.reference.tensors, self.merge.method.gives == "model" and self.merge.adds_base
        return frozenset(name for name in self.alignment.copied if model or not tensors[name].is_float)

    @cached_property
    def measured(self) -> dict[str, Eight]:
        """Tensors that are merged twice: before their scales are known, and to be written."""
        return {name: one for name, one in self.encoded.tensors.items() if isinstance(one, Eight)}

    def piece(self, name: str) -> int:
        """Elements of a chunk of a tensor in eight or four bits."""
        step, columns = self.encoded.tensors[name].step, self.merge.reference.tensors[name].shape[-1]
        if self.merge.cut == "row":
            step = math.lcm(step, columns)
        models = len(self.merge.models)
        each = 2 * self.workers * (buffer_bytes(models) + temporary_bytes(models) + ENCODING)
        several = min(max(self.memory // (each * step), 1), SEVERAL if step > columns else 1)
        return max(self.chunk, several * step) // step * step

    @cached_property
    def bytes_read(self) -> int:
        """All sweeps together; the samples before a sweep (about 1%) are not counted."""
        tensors = self.merge.reference.tensors
        total = sum(tensors[name].nbytes for name in self.copied)
        for name in self.measured:
            total += self.sweep_bytes(name, apply=True) if name in self.asked else tensors[name].nbytes
        return total + sum(
            (sweeps and sweeps * self.sweep_bytes(name, apply=False)) + self.sweep_bytes(name, apply=True)
            for name, sweeps in zip(self.asked, map(self.sweeps_to_ask, self.asked), strict=True)
        )

    def sweep_bytes(self, name: str, apply: bool) -> int:
        """Bytes read of one tensor in one sweep."""
        total, based = sum(one.nbytes for one in self.on_data.get(name, ())), apply and self.merge.onto_base
        for operand in self.operands[name]:
            total += 0 if operand.stored is None else operand.stored.nbytes
            total += _stored_bytes(operand.added) if operand.deltas else 0
            based = based or operand.base != 0
        if based:
            stored, deltas = self.base_of(name)
            total += stored.nbytes + _stored_bytes(deltas)
        return total

    def way(self, name: str) -> tuple[Any, ...] | None:
        """How a merged tensor is read, merged and stored, for those that may share a chunk; None if it may not."""
        if name not in self._ways:
            self._ways[name] = self._way(name)
        return self._ways[name]

    @cached_property
    def _ways(self) -> dict[str, tuple[Any, ...] | None]:
        return {}

    def _way(self, name: str) -> tuple[Any, ...] | None:
        merge = self.merge
        apart = merge.method.gives == "deltas" or (merge.scope == "model" and not self.blind)
        if apart or name in self.encoded.tensors or not self._is_plain(name):
            return None
        rows = [(one.stored and one.stored.dtype, one.base) for one in self.operands[name]]
        return (merge.params_for(name), self.dtypes[name], merge.reference.tensors[name].dtype, *rows)

    def _is_plain(self, name: str) -> bool:
        """Whether base and models hold a merged tensor in files as it is: no deltas, no scales, no other layout."""
        reference, operands = self.merge.reference, self.operands[name]
        stored = [reference.tensors[name], *(one.stored for one in operands if one.stored is not None)]
        folded = name in reference.deltas or any(one.deltas for one in operands)
        return not folded and all(info.made is None and info.dtype not in FP8 for info in stored)

    def keeps(self, name: str) -> bool:
        """Whether elements of a merged tensor that models and base store as the same bytes come out as the base's;
        not where the method still has to be asked, since its answers are recorded."""
        own, merge = self.merge.reference.tensors[name].dtype, self.merge
        alike = own != "F64" and self._is_plain(name) and self.sweeps_to_ask(name) == self.asked[name]
        ways = {(one.stored.dtype, one.base) for one in self.operands[name] if one.stored is not None}
        return merge.onto_base and merge.method.keeps_base and alike and ways <= {(own, -1)}

    def base_of(self, name: str) -> tuple[TensorInfo, tuple[Delta, ...]]:
        """The tensor that the base's values are read from, and the deltas on top."""
        reference = self.merge.reference
        return split(reference.tensors[name], reference.deltas.get(name, ()))

    def needs_base(self, name: str, apply: bool) -> bool:
        return (apply and self.merge.onto_base) or any(operand.base for operand in self.operands[name])

    @cached_property
    def longest(self) -> int:
        """Elements of the largest chunk."""
        tensors = self.merge.reference.tensors
        pieces = (min(self.piece(name), tensors[name].numel) for name in self.encoded.tensors)
        return max([self.chunk, *pieces, *(tensors[name].numel for name in self.whole)])

    @cached_property
    def buffer_bytes(self) -> int:
        """Memory of all workers' buffers and temporaries."""
        models, workspace = len(self.merge.models), self.merge.method.workspace
        temporaries = temporary_bytes(models) * (self.chunk if workspace else self.longest)
        temporaries += ENCODING * self.longest if self.encoded.tensors else 0
        if workspace:  # added, because freed memory is kept; includes the merged chunk plus base in the stored type
            wholes = [(self.merge.reference.tensors[name], self.merge.params_for(name)) for name in self.whole]
            taken = [workspace(info.shape, models, params) + 3 * 4 * info.numel for info, params in wholes]
            temporaries += max(taken, default=0)
        return self.workers * (self.longest * buffer_bytes(models) + temporaries + self.delta_bytes)

    @cached_property
    def delta_bytes(self) -> int:
        """The most bytes that one worker's open deltas and tensors made of others hold: those of one tensor, for all
        models and the base."""
        held, models = [0], [self.merge.reference, *self.merge.models]
        if not any(model.deltas or any(info.made for info in model.tensors.values()) for model in models):
            return 0
        for name in self.merge.reference.tensors:
            operands = self.operands.get(name, ())
            stored, deltas = self.base_of(name)
            alone = not operands or self.needs_base(name, apply=True)
            opened = [*(deltas if alone else ()), *(delta for one in operands for delta in one.deltas)]
            read = [*([stored] if alone else []), *(one.stored for one in operands if one.stored is not None)]
            made = {id(info.made): info.made.resident() for info in read if info.made is not None}
            held.append(sum(delta.resident() for delta in opened) + sum(made.values()))
        return max(held)

    @property
    def peak_memory(self) -> int:
        """Buffers plus the most that statistics may hold, in bytes."""
        return self.buffer_bytes + (self.statistic_room * 4 if self.passes else 0)

    @cached_property
    def statistic_room(self) -> int:
        """Bytes that the statistics of a group may hold, in all workers together."""
        largest = max((sum(unit.numel for unit in group.units) for group in self.groups), default=0)
        # the rest is for copies: those sent by the workers, and the combined states
        return min((self.memory - self.buffer_bytes) // 4, largest * len(self.merge.models) * BYTES)

    def zero_share(self, model: int) -> float:
        """The share of elements on which a model's task vector is exactly zero, as far as headers tell."""
        untouched = sum(
            self.merge.reference.tensors[name].numel
            for name in self.alignment.merged
            if self.operands[name][model].stored is None and not self.operands[name][model].added
        )
        return untouched / max(self.elements, 1)


log = logging.getLogger(__name__)


def plan_merge(
    merge: Merge,
    *,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    device: str = "auto",
    shard_size: int = SHARD_SIZE,
    chunk: int | None = None,
    cluster: Cluster = (),
) -> Plan:
    """Plan a merge; `ModelError` if the models do not fit together, with every mismatch.

    `chunk` (elements) is for tests: results do not depend on it. cluster: its machines, with their workers.
    """
    method, tensors, stored = merge.method, merge.reference.tensors, _STORED.get(merge.dtype or "")
    check_models(merge)
    alignment = align(merge.reference, merge.models, merge.wanted)
    if alignment.problems:
        raise mismatch.describe(merge.reference, merge.models, alignment)
    merge = replace(merge, notes=(*merge.notes, *alignment.notes(merge.reference)))
    if not alignment.merged and not merge.copies:
        raise RecipeError("include/exclude leave no tensor to merge")
    operands = operands_of(merge, alignment.sources)
    dtypes = {info.name: stored_type(info, stored, merge.wanted(info.name)) for info in tensors.values()}
    naming = merge.reference.naming if method.gives == "model" else USUAL
    to_encode = encoded_of(merge)
    dtypes |= dict.fromkeys(to_encode.tensors, "F32")  # before they are rounded
    parts = {name: one.parts for name, one in to_encode.tensors.items()}
    shards = lay_out(tensors.values(), dtypes, shard_size, not merge.reference.sliced, naming, parts)
    if method.gives == "deltas":
        numels = {name: tensors[name].numel for name in alignment.merged}
        shards = [with_tasks(shard, merge.tasks, numels) for shard in shards]
    where = device_of("cpu" if cluster and device == "auto" else device)
    if cluster and where.type != "cpu":
        raise RecipeError(f"--device {device}: merges on a cluster run on CPUs", "leave out --device, or --on")
    workers = max(machine.workers for machine in cluster) if cluster else workers
    asked, asked_of_all, blind = trace.count(merge, alignment.merged)
    workers = workers or (3 if where.type == "cuda" else cores())
    size = max(chunk or chunk_size(merge, where, memory // workers), least_chunk(merge))
    size += -size % 8 if method.gives == "deltas" else 0  # so that masks have whole bytes
    plan = Plan(
        merge=merge,
        alignment=alignment,
        operands=operands,
        dtypes=dtypes,
        shards=shards,
        groups=grouped(merge, operands, shards, asked, memory // 8),
        asked=asked,
        asked_of_all=asked_of_all,
        blind=blind,
        chunk=size,
        whole=frozenset(name for name in alignment.merged if merge.whole(tensors[name], alignment.aliases.get(name))),
        workers=workers,
        memory=memory,
        device=where,
        cluster=cluster,
        encoded=to_encode,
    )
    check_descriptors(merge.files + workers * (2 + len(shards[0].files)))  # a worker has a pipe, and writes one shard
    if chunk is None:
        check_memory(method, plan.buffer_bytes + (2 * MB if plan.passes else 0), memory)
    for note in merge.notes:
        log.info("note: %s", note)
    log.info("%s: %d tensors, %s to read", method.name, len(alignment.merged), human(plan.bytes_read))
    return plan


def _stored_bytes(deltas: Sequence[Delta]) -> int:
    return sum(info.nbytes for delta in deltas for info in delta.stored)
