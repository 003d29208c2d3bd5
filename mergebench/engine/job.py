"""What is to be merged: a resolved recipe in the engine's terms, and how each model's values are made."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.model import Delta, Model
from mergebench.engine.lines import Lines
from mergebench.engine.method import Cut, Method


@dataclass(frozen=True)
class Merge:
    """A resolved recipe: models opened, parameters checked. What the engine merges."""

    method: Method
    params: Any  # what holds for every tensor that is not in by_tensor
    base: Model | None
    models: tuple[Model, ...]
    names: tuple[str, ...]  # short names of the models, for messages
    scope: str = "tensor"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    dtype: str | None = None  # stored type; None keeps each tensor's own
    by_tensor: Mapping[str, Any] = field(default_factory=dict)  # parameters that vary: gradients and filters
    lines: Lines | None = None  # what the method's function scales its result by
    recipe: Mapping[str, Any] = field(default_factory=dict)  # as resolved, for provenance
    notes: tuple[str, ...] = ()  # what may be other than expected
    edits: tuple[Any, ...] = ()  # what is made of the result before it is published; the engine only carries them
    copies: bool = False  # nothing need be merged: what is wanted is a copy, to be edited

    @property
    def reference(self) -> Model:
        """The model that gives names, shapes, config and what is not merged."""
        return self.base if self.base is not None else self.models[0]

    @property
    def from_base(self) -> bool:
        """Whether the method is given differences to the base, and gives one."""
        return self.method.takes == "task_vectors" and self.base is not None

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The models' names as plain names of directories, each once."""
        plain = [re.sub(r"[^\w.-]+", "-", name)[:80].strip("-.") or "task" for name in self.names]
        return tuple(
            f"{name}-{plain[:i].count(name) + 1}" if name in plain[:i] else name for i, name in enumerate(plain)
        )

    @property
    def onto_base(self) -> bool:
        """Whether what the method gives is added to the base; else a vector is written."""
        return self.from_base and self.method.gives == "model"

    @property
    def cut(self) -> Cut:
        return self.method.cut_with(self.params)

    def whole(self, info: TensorInfo, alias: str | None = None) -> bool:
        """Whether a tensor must come in one chunk; `alias`: what it is tied to, by whose name methods know it."""
        return self.cut == "tensor" and self.method.whole(alias or info.name, info.shape)

    def params_for(self, name: str) -> Any:
        """The parameters that hold for a tensor."""
        return self.by_tensor.get(name, self.params)

    def wanted(self, name: str) -> bool:
        """Whether a tensor is merged (else it is copied from the base)."""
        inside = not self.include or any(fnmatch.fnmatchcase(name, glob) for glob in self.include)
        return inside and not any(fnmatch.fnmatchcase(name, glob) for glob in self.exclude)


class Operand(NamedTuple):
    """How one model's row of a chunk is made: stored +- base + delta, each only where needed."""

    stored: TensorInfo | None
    base: int  # -1, 0 or 1 times the base
    delta: Delta | None


def operands_of(merge: Merge, sources: Mapping[str, Sequence[TensorInfo]]) -> dict[str, tuple[Operand, ...]]:
    """How each model's row is made, for every merged tensor; a base read twice would cancel, so it is not read."""
    tensors = merge.reference.tensors
    base_files = {header.file for header in merge.reference.headers}
    columns = []
    for number, model in enumerate(merge.models):
        on_base = not base_files.isdisjoint(header.file for header in model.headers)
        column = []
        for name, infos in sources.items():
            info = infos[number]
            delta = model.deltas.get(info.name)
            if not merge.from_base:
                column.append(Operand(info, 1 if model.is_task_vector else 0, delta))
            elif model.is_task_vector:
                column.append(Operand(info, 0, delta))
            elif on_base and (info.file, info.offset) == (tensors[name].file, tensors[name].offset):
                column.append(Operand(None, 0, delta))  # the model is the base plus an adapter
            else:
                column.append(Operand(info, -1, delta))
        columns.append(column)
    return dict(zip(sources, zip(*columns, strict=True), strict=True))
