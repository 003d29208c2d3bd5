"""A patch: the change that an edit made to a model, small beside the model, applied and reverted exactly.

It is a file of deltas (`deltas.formats.native`) whose deltas are row patches that share one direction. The new vectors
are orig + amount * direction, in float32, cast once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergebench.checkpoint.documents import complaint
from mergebench.checkpoint.files import DTYPE_NAME, Files, whole
from mergebench.checkpoint.format import Base
from mergebench.checkpoint.header import TensorInfo, damaged
from mergebench.checkpoint.model import Model
from mergebench.deltas.formats.native import DeltaFile, Later, Writing, read_file, write_file
from mergebench.editing.neurons import Neurons, vectors
from mergebench.editing.summary import Edit
from mergebench.errors import ModelError, RunError

BLOCK = 1 << 16  # elements processed at once: they fit into the cache


class Change(NamedTuple):
    """The change of one tensor: neurons [k], the amount of the direction for each [k], their original vectors [k,
    d]."""

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

    deltas: DeltaFile
    direction: Tensor  # [width] float32

    @property
    def file(self) -> Path:
        return self.deltas.file

    @property
    def names(self) -> list[str]:
        return list(self.deltas.entries)

    @property
    def about(self) -> Mapping[str, Any]:
        """Edit, alpha, rows and the like."""
        return self.deltas.made

    def numbers(self, name: str) -> Tensor:
        """The changed neurons of the tensor `name`, int64 ascending."""
        return self._part(name, "rows")

    def amounts(self, name: str) -> Tensor:
        """How much of the direction each of them gets, [k] float32."""
        return self._part(name, "amount")

    def columns(self, name: str) -> bool:
        """Whether the tensor's neurons are columns."""
        return name in self.deltas.turned or bool(self.deltas.entries[name].settings.get("columns"))

    def change(self, name: str) -> Change:
        """The change of the tensor `name`."""
        info = self.deltas.entries[name].orig
        assert info is not None
        with Files() as files:
            originals = whole(files, info)
        return Change(self.numbers(name), self.amounts(name), originals, self.columns(name))

    def neurons(self, model: Model, name: str) -> Neurons:
        """The tensor's neurons in a model; `ModelError` if they do not fit."""
        return self.neurons_in(model.tensors, model.reference, name)

    def neurons_in(self, tensors: Mapping[str, TensorInfo], reference: str, name: str) -> Neurons:
        """The neurons in the given tensors; `reference` names the model in messages."""
        self.deltas.on(name, Base(reference, tensors, {}))
        return Neurons(tensors[name], self.columns(name))

    def _part(self, name: str, part: str) -> Tensor:
        with Files() as files:
            return whole(files, self.deltas.entries[name].parts[part])


def is_patch(file: str | Path) -> bool:
    """Whether a file of deltas is the patch of one edit; raises as `read_file` does."""
    return _direction(read_file(file)) is not None


def _direction(read: DeltaFile) -> TensorInfo | None:
    """The direction that all deltas share; None if they are not those of one edit."""
    shared = {entry.parts["direction"].name for entry in read.entries.values() if "direction" in entry.parts}
    plain = all(entry.kind == "row_patch" and entry.orig is not None for entry in read.entries.values())
    named = (info for info in read.header.tensors if info.name == "direction")
    return next(named, None) if plain and shared <= {"direction"} else None


def open_patch(file: str | Path) -> Patch:
    """Read a patch's header and direction; `ModelError` if it is missing or no patch, `RunError` if damaged."""
    read = read_file(file)
    direction = _direction(read)
    if direction is None:
        hint = "mergebench inspect tells what it holds; a patch is what `mergebench edit` writes beside the model"
        raise ModelError(f"{file}: its deltas are not those of one edit", hint)
    fault = complaint(read.made, Edit)
    if fault is not None:
        raise damaged(read.file, f"not readable as a patch: {fault}")
    with Files() as files:
        return Patch(read, whole(files, direction))


def write_patch(
    file: Path,
    model: Model,
    direction: Tensor,
    changes: Mapping[str, tuple[Tensor, Tensor]],
    columns: frozenset[str],
    about: Mapping[str, Any],
    base: str | None = None,
) -> None:
    """Write, atomically, the patch that adds `changes[NAME][1]` (float32) times the direction to the neurons
    `changes[NAME][0]` (int64, ascending) of each tensor NAME. The original vectors come from the model. base: the
    identity of the model that the patch belongs to."""
    with Files() as files:
        values, writings = model.values(files), {}
        for name, (numbers, amounts) in changes.items():
            neurons = Neurons(model.tensors[name], name in columns)
            make = partial(vectors, values, neurons, numbers)
            settings = {"columns": neurons.info.shape[-1]} if name in columns else {}
            parts = {"rows": numbers, "amount": amounts}
            before = Later(values.copied_type(name), (len(numbers), len(direction)), make)
            writings[name] = Writing("row_patch", settings, parts, {"direction": "direction"}, before)
        write_file(file, writings, {"direction": direction}, about, base)


def check_finite(name: str, edited: Tensor) -> None:
    """Refuse a vector that the stored type cannot hold."""
    if not math.isfinite(edited.sum(dtype=torch.float32)) and not edited.isfinite().all():
        raise RunError(f"{name}: the edited rows do not fit into {DTYPE_NAME[edited.dtype]}", "choose a smaller step")
