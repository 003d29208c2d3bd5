"""A resolved recipe in the engine's terms, and how each model's values are computed."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.header import FP8, TensorInfo
from mergebench.checkpoint.measured import Measured
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.values import split
from mergebench.engine.lines import Lines
from mergebench.engine.method import Cut, Method


@dataclass(frozen=True)
class Merge:
    """A resolved recipe, the engine's input: models are opened, parameters checked."""

    method: Method
    params: Any  # for every tensor that is not in by_tensor
    base: Model | None
    models: tuple[Model, ...]
    names: tuple[str, ...]  # short names of the models, for messages
    scope: str = "tensor"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    dtype: str | None = None  # stored type; None keeps each tensor's own
    encoding: str | None = None  # float8_e4m3 or mxfp4: of the tensors that have a layout for it
    by_tensor: Mapping[str, Any] = field(default_factory=dict)  # parameters that vary: gradients and filters
    lines: Lines | None = None  # scaling of the method's result by layer
    recipe: Mapping[str, Any] = field(default_factory=dict)  # as resolved, for provenance
    folders: tuple[str, ...] = ()  # where the recipe's relative paths are looked up, for provenance
    notes: tuple[str, ...] = ()  # notes for the user
    edits: tuple[Any, ...] = ()  # applied to the result before it is published; the engine only carries them
    adds_base: bool = True  # else the result of a method on task vectors is written as a task vector
    statistics: tuple[Measured, ...] = ()  # of the models, for a method that reads them
    data: tuple[Any, ...] = ()  # what to make them of before the merge; the engine only carries it, as `resolve` gives
    # it the numbers of the recipe's entries
    copies: bool = False  # nothing to merge: the result is a copy, to be edited

    @property
    def reference(self) -> Model:
        """The model that gives names, shapes, config and all tensors that are not merged."""
        return self.base if self.base is not None else self.models[0]

    @property
    def from_base(self) -> bool:
        """Whether the method's input and result are differences to the base."""
        return self.method.takes == "task_vectors" and self.base is not None

    @property
    def files(self) -> int:
        """The number of files that are read."""
        files = {header.file for model in [*self.models, self.reference] for header in model.headers}
        return len(files | {one.file for one in self.statistics})

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The models' names as unique directory names."""
        given: dict[str, None] = {}
        for name in self.names:
            plain = re.sub(r"[^\w.-]+", "-", name)[:80].strip("-.") or "task"
            numbered = (f"{plain}-{number}" for number in range(2, len(self.names) + 2))
            given[next(one for one in (plain, *numbered) if one not in given)] = None
        return tuple(given)

    @property
    def onto_base(self) -> bool:
        """Whether the method's result is added to the base; else it is written as a task vector."""
        return self.from_base and self.method.gives == "model" and self.adds_base

    @property
    def cut(self) -> Cut:
        return self.method.cut_with(self.params)

    def whole(self, info: TensorInfo, alias: str | None = None) -> bool:
        """Whether a tensor must come in one chunk; `alias`: the tensor it is tied to, whose name methods see."""
        return self.cut == "tensor" and self.method.whole(alias or info.name, info.shape)

    def params_for(self, name: str) -> Any:
        """The parameters of a tensor."""
        return self.by_tensor.get(name, self.params)

    def wanted(self, name: str) -> bool:
        """Whether a tensor is merged (else it is copied from the base)."""
        if not (self.include or self.exclude):
            return True
        inside = not self.include or any(fnmatch.fnmatchcase(name, glob) for glob in self.include)
        return inside and not any(fnmatch.fnmatchcase(name, glob) for glob in self.exclude)


class Operand(NamedTuple):
    """How one model's row of a chunk is computed: stored values with deltas, +- the base; or only the base's deltas."""

    stored: TensorInfo | None  # None: the model is the base, and deltas
    base: int = 0  # -1, 0 or 1 times the base
    deltas: tuple[Delta, ...] = ()
    shared: int = 0  # number of leading deltas that the base has too, which are no part of the difference

    @property
    def added(self) -> tuple[Delta, ...]:
        """The deltas that the row holds."""
        return self.deltas[self.shared :]

    @property
    def folds(self) -> bool:
        """Whether the row is read by tiles with the deltas folded in."""
        return self.stored is not None and any(delta.folds for delta in self.deltas)


def operands_of(merge: Merge, sources: Mapping[str, Sequence[TensorInfo]]) -> dict[str, tuple[Operand, ...]]:
    """How each model's row is computed, for every merged tensor; a base that cancels is not read."""
    reference = merge.reference
    below = {name: split(reference.tensors[name], reference.deltas.get(name, ())) for name in sources}
    columns = []
    for number, model in enumerate(merge.models):
        column = []
        for name, infos in sources.items():
            stored, deltas = split(infos[number], model.deltas.get(infos[number].name, ()))
            if merge.from_base and not model.is_task_vector:
                column.append(_from_base(*below[name], stored, deltas))
            else:
                column.append(Operand(stored, 1 if model.is_task_vector and not merge.from_base else 0, deltas))
        columns.append(column)
    return dict(zip(sources, zip(*columns, strict=True), strict=True))


def _from_base(own: TensorInfo, below: tuple[Delta, ...], stored: TensorInfo, deltas: tuple[Delta, ...]) -> Operand:
    """A model's difference to the base, which is `own` with the deltas `below`."""
    if stored.place != own.place or deltas[: len(below)] != below:
        return Operand(stored, -1, deltas)
    added = deltas[len(below) :]
    if added and added[0].difference is not None and not any(delta.needs_base for delta in added):
        return Operand(added[0].difference, 0, added[1:])  # a task vector is read as stored
    return Operand(None, 0, deltas, len(below))


def stored_type(info: TensorInfo, given: str | None, merged: bool) -> str:
    """The type a tensor is written in: the given type, else its own; bfloat16 for FP8 that is merged or was scaled."""
    own = info.stored_dtype
    if not info.is_float or (own == "F32" and _KEPT.search(info.name)):
        return own
    return given or ("BF16" if own in FP8 and (merged or info.scale) else own)


_KEPT = re.compile(r"(^|\.)e_score_correction_bias$")  # of DeepSeek's router: transformers loads it in float32 always
