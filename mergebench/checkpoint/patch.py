"""A patch: what an edit did to a model, small beside it, to be applied and taken back bit for bit.

A safetensors file:

    direction    [width] float32: what was added, times each neuron's own amount
    NAME.rows    [k] int64: the changed neurons of the tensor NAME, ascending
    NAME.amount  [k] float32
    NAME.orig    [k, width]: their vectors before, as stored

Its metadata says under `patch`, as JSON, which tensors' neurons are `columns` and how the edit was made. The new
vectors are orig + amount * direction, in float32, cast once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergebench.checkpoint.files import TORCH_DTYPE, Files, part_of, whole
from mergebench.checkpoint.header import Header, TensorInfo, damaged, read_header
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.neurons import Neurons, Stored
from mergebench.checkpoint.patched import METADATA, Patched
from mergebench.checkpoint.shards import OutTensor, Shard, ShardFiles, create
from mergebench.errors import ModelError, RunError

DTYPE = {dtype: name for name, dtype in TORCH_DTYPE.items()}
PARTS = ("rows", "amount", "orig")
BLOCK = 1 << 16  # elements worked on at once: they stay in the cache


class Change(NamedTuple):
    """What changes in one tensor: neurons [k], how much of the direction each gets [k], their vectors before [k, d]."""

    numbers: Tensor  # int64, ascending
    amounts: Tensor  # float32
    originals: Tensor  # as stored
    transposed: bool

    def edited(self, direction: Tensor) -> Tensor:
        """The vectors after, [k, d] as stored."""
        exact = torch.promote_types(self.originals.dtype, torch.float32)
        out, step = torch.empty_like(self.originals), max(BLOCK // max(len(direction), 1), 1)
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            added = self.amounts[rows, None].to(exact) * direction.to(exact)
            out[rows] = added.add_(self.originals[rows])  # cast once
        return out


@dataclass(frozen=True)
class Patch:
    """A patch file, header checked; made by `open_patch`."""

    header: Header
    direction: Tensor  # [width] float32
    tensors: dict[str, tuple[TensorInfo, TensorInfo, TensorInfo]]  # rows, amount, orig by the changed tensor's name
    columns: frozenset[str]
    about: Mapping[str, Any]  # edit, alpha, rows …

    @property
    def file(self) -> Path:
        return self.header.file

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def numbers(self, name: str) -> Tensor:
        """Which neurons of the tensor `name` change; `RunError` where they are not in order."""
        with Files() as files:
            numbers = whole(files, self.tensors[name][0])
        if not len(numbers) or (numbers.diff() <= 0).any() or numbers[0] < 0:
            raise damaged(self.file, f"the rows of '{name}' are not in order")
        return numbers

    def amounts(self, name: str) -> Tensor:
        """How much of the direction each of them gets, [k] float32."""
        with Files() as files:
            return whole(files, self.tensors[name][1])

    def change(self, name: str) -> Change:
        """What changes in the tensor `name`."""
        with Files() as files:
            originals = whole(files, self.tensors[name][2])
        return Change(self.numbers(name), self.amounts(name), originals, name in self.columns)

    def neurons(self, model: Model, name: str) -> Neurons:
        """Where the tensor's neurons are in a model; `ModelError` where they cannot be."""
        return self.neurons_in(model.tensors, model.reference, name)

    def neurons_in(self, tensors: Mapping[str, TensorInfo], reference: str, name: str) -> Neurons:
        """The same in the tensors of the model that goes by `reference`."""
        info, numbers = tensors.get(name), self.numbers(name)
        if info is None:
            raise ModelError(f"{self.file}: {reference} has no tensor '{name}'", ANOTHER)
        where = Neurons(info, name in self.columns)
        fits = len(info.shape) in (2, 3) and where.width == len(self.direction) and where.count > int(numbers[-1])
        if not (fits and info.is_float):
            what = f"{name}: the patch changes {len(numbers)} vectors of {len(self.direction)} elements"
            raise ModelError(f"{what}, {reference} has {info.dtype} {list(info.shape)}", ANOTHER)
        return where


def read_patch(file: Path, reference: str, base: Mapping[str, TensorInfo]) -> tuple[dict[str, Patched], Header]:
    """What a patch adds to the tensors of a model, by their names, and the file it is read from.

    Raises `ModelError` where it is no patch or belongs to a model of other tensors, `RunError` where it is damaged.
    """
    patch = open_patch(file)
    (direction,) = (info for info in patch.header.tensors if info.name == "direction")
    deltas = {}
    for name, (numbers, amounts, _) in patch.tensors.items():
        where = patch.neurons_in(base, reference, name)
        deltas[name] = Patched(direction, numbers, amounts, where.info.shape, where.transposed)
    return deltas, patch.header


ANOTHER = "the patch belongs to another model"


def is_patch(file: Path) -> bool:
    """Whether a file's header says so."""
    return file.suffix == ".safetensors" and file.is_file() and METADATA in read_header(file).metadata


def open_patch(file: str | Path) -> Patch:
    """Read a patch's header and direction; `ModelError` where it is missing or no patch, `RunError` where damaged."""
    header = read_header(Path(file))
    if METADATA not in header.metadata:
        raise ModelError(f"{file}: not a patch", "a patch is what `mergebench edit` writes beside the model")
    found = {info.name: info for info in header.tensors}
    direction = found.pop("direction", None)
    try:
        about = json.loads(header.metadata[METADATA])
        columns = frozenset(about["columns"])
        names = dict.fromkeys(name.rpartition(".")[0] for name in found)
        tensors = {name: (found[f"{name}.rows"], found[f"{name}.amount"], found[f"{name}.orig"]) for name in names}
    except (ValueError, KeyError, TypeError):
        raise damaged(header.file, "not readable as a patch") from None
    sound = direction is not None and direction.dtype == "F32" and len(direction.shape) == 1
    for rows, amount, orig in tensors.values():
        kinds = rows.dtype == "I64" and amount.dtype == "F32" and orig.is_float
        sides = len(rows.shape) == 1 and amount.shape == rows.shape
        sound = sound and kinds and sides and orig.shape == (*rows.shape, *(direction.shape if direction else ()))
    if direction is None or not sound or len(found) != len(PARTS) * len(tensors):
        raise damaged(header.file, "its tensors are not those of a patch")
    with Files() as files:
        return Patch(header, whole(files, direction), tensors, columns, about)


def write_patch(
    file: Path,
    model: Model,
    direction: Tensor,
    changes: Mapping[str, tuple[Tensor, Tensor]],
    columns: frozenset[str],
    about: Mapping[str, Any],
) -> None:
    """Write the patch that gives the neurons `changes[NAME][0]` (int64, ascending) of a model's tensors
    `changes[NAME][1]` (float32) times the direction; their vectors before are the model's. All at once, in place."""
    tensors = [OutTensor("direction", "F32", tuple(direction.shape), direction.nbytes)]
    with Files() as files:
        stored = Stored(model, files)
        for name, (numbers, _) in changes.items():
            dtype = stored.vectors(Neurons(model.tensors[name], name in columns), numbers[:0]).dtype
            k, width = len(numbers), len(direction)
            tensors += [
                OutTensor(f"{name}.rows", "I64", (k,), 8 * k),
                OutTensor(f"{name}.amount", "F32", (k,), 4 * k),
                OutTensor(f"{name}.orig", DTYPE[dtype], (k, width), k * width * dtype.itemsize),
            ]
        metadata = {METADATA: json.dumps({**about, "columns": sorted(columns)})}
        shard = Shard(part_of(file.name), tuple(tensors), metadata)
        create(file.with_name(shard.file), shard)
        with closing(ShardFiles(file.parent, [shard])) as output:
            output.write("direction", 0, direction)
            for name, (numbers, amounts) in changes.items():
                output.write(f"{name}.rows", 0, numbers)
                output.write(f"{name}.amount", 0, amounts)
                vectors = stored.vectors(Neurons(model.tensors[name], name in columns), numbers)
                output.write(f"{name}.orig", 0, vectors.reshape(-1))
    file.with_name(shard.file).replace(file)


def check_finite(name: str, edited: Tensor) -> None:
    """Refuse a vector that the stored type cannot hold."""
    if not math.isfinite(edited.sum(dtype=torch.float32)) and not edited.isfinite().all():
        raise RunError(f"{name}: the edited rows do not fit into {DTYPE[edited.dtype]}", "choose a smaller alpha")
