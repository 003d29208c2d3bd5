"""One task of several that share a vector: a one-bit mask per element, and a factor.

    OUT/model.safetensors               the vector: a difference to the base, for all tasks
    OUT/tasks/NAME/model.safetensors    the task's mask: uint8, bit i % 8 of byte i // 8 is element i's
    OUT/tasks/NAME/task.json            {"scale": its factor, ...}

As `BASE+OUT/tasks/NAME` it stands for base + scale * mask * vector, read in pieces like an adapter's difference.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.documents import document
from mergebench.checkpoint.format import Base, Deltas, delta_format
from mergebench.checkpoint.header import Header, read_header
from mergebench.checkpoint.model import VECTOR, holds_vector, open_directory
from mergebench.checkpoint.shards import OutTensor, Shard
from mergebench.deltas.sparse import sparse
from mergebench.errors import ModelError, RunError

FOLDER, CONFIG = "tasks", "task.json"
_HINT = "name the model that the tasks were merged on before the '+'"


class About(TypedDict):
    """What is read of task.json."""

    scale: float


def mask_bytes(numel: int) -> int:
    """Bytes of a mask of `numel` elements."""
    return -(-numel // 8)


def is_task(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def tasks_in(directory: Path) -> list[str]:
    """The tasks in a directory that holds their vector."""
    return sorted(path.parent.name for path in directory.glob(f"{FOLDER}/*/{CONFIG}"))


def _vector_of(task: Path) -> list[Header]:
    """The files of the vector that a task's mask applies to, two folders above the task."""
    directory = task.resolve().parents[1]
    try:
        headers = open_directory(str(directory), directory)
    except ModelError:
        headers = []
    if not holds_vector(headers):
        raise ModelError(f"{task}: {directory} does not hold the vector of this mask", "keep what was written together")
    return headers


@delta_format(what="a task's mask", claims=lambda place: is_task(place) or bool(tasks_in(place)), alone=is_task)
def emr(directory: Path, base: Base) -> Deltas:
    """What a task changes; `ModelError` where it does not belong to this base, `RunError` where a file is damaged."""
    if not is_task(directory):
        tasks = tasks_in(directory)
        hint = f"name one of its tasks: {directory}/{FOLDER}/{tasks[0]}"
        raise ModelError(f"{directory}: it holds {', '.join(tasks)}, not one task", hint)
    scale, vector = _scale(directory), _vector_of(directory)
    masks = [read_header(directory / header.file.name) for header in vector]
    shared = {tensor.name: tensor for header in vector for tensor in header.tensors}
    deltas: dict[str, Delta] = {}
    for bits in (tensor for header in masks for tensor in header.tensors):
        info, target = shared.get(bits.name), base.tensors.get(bits.name)
        if info is None or bits.dtype != "U8" or bits.shape != (mask_bytes(info.numel),):
            raise RunError(f"{bits.file}: {bits.name}: no mask of the vector's", "merge the tasks again")
        if target is None or target.shape != info.shape or not target.is_float:
            has = "does not have it" if target is None else f"has {target.dtype} {list(target.shape)}"
            raise ModelError(f"{directory}: {bits.name}: the task changes {list(info.shape)}, base {has}", _HINT)
        deltas[bits.name] = sparse.on(info.shape, {"vector": info, "mask": bits}, scale=scale)
    return Deltas(deltas, [*vector, *masks])


def with_tasks(shard: Shard, tasks: Sequence[str], merged: Collection[str]) -> Shard:
    """A shard of a vector, with the masks of these tasks in files beside it; merged: names of tensors with masks."""
    sizes = [(name, mask_bytes(math.prod(shape))) for name, _, shape, *_ in shard.tensors if name in merged]
    masks = tuple(OutTensor(name, "U8", (size,), size) for name, size in sizes)
    beside = tuple(Shard(f"{FOLDER}/{task}/{shard.file}", masks) for task in tasks)
    return replace(shard, metadata=VECTOR, beside=beside)


def _scale(directory: Path) -> float:
    path = directory / CONFIG
    return float(document(path, About)["scale"])
