"""Kinds of adapter that a fine-tune can be written as: what a file in `targets/` declares.

A kind says which tensors it can hold, how it fits one tensor's difference D, and what it writes:

    class _Fitting:                  # one run of it
        held = {...}                 # the tensors it can hold
        def fit(self, name): ...     # what it stores of one, and how much of |D|^2 that keeps

    mine = Target(stores="...", takes={"rank": 16}, begin=_Fitting, within=...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from mergebench.adapters.fine_tune import Reading

Settings = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]  # by tensor
Answers = Mapping[str, Mapping[str, Any]]  # by tensor that is stored: `total`, `kept`, `nbytes`, `about`, `sums`


class Fit(NamedTuple):
    """What an adapter stores of one tensor's difference D."""

    tensors: Mapping[str, Tensor]  # by their names in the file; none: the tensor is left out
    total: float  # |D|^2
    kept: float  # |D|^2 - |D - D'|^2, where D' is what the adapter makes of the tensors
    about: Mapping[str, Any] = {}  # for the provenance, such as the rank
    sums: Mapping[str, Any] = {}  # for `Fitting.summary` alone; JSON, like `about`

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Fitting(Protocol):
    """One run of a kind on one fine-tune."""

    @property
    def file(self) -> str: ...  # the file its tensors go to

    @property
    def beside(self) -> tuple[Path, ...]: ...  # files that it needs in the folder of the output directory

    @property
    def held(self) -> Mapping[str, str]: ...  # the tensors that it can hold, and what the provenance calls them

    def fit(self, name: str) -> Fit: ...  # one of those tensors

    def shapes(self, stored: Shapes, answers: Answers) -> Shapes: ...  # of the file's tensors, padded with zeros

    def config(self, answers: Answers) -> dict[str, Any] | None: ...  # adapter_config.json, of the tensors stored

    def metadata(self, answers: Answers) -> Mapping[str, str]: ...  # of the file

    def summary(self, answers: Answers) -> Mapping[str, Any]: ...  # more for the provenance

    def at_most(self) -> int: ...  # bytes of its file; 0 if it cannot tell


@dataclass(frozen=True)
class Target:
    """A kind of adapter that a fine-tune can be written as.

    stores: a few words for the table. takes: its settings and their defaults. begin: starts a run on the changes of a
    fine-tune; raises `RecipeError` for invalid settings, `ModelError` if the model has no place for it. within: the
    settings to compare, each of at most a number of bytes. check: raises `RecipeError` for settings, before anything is
    read; may complete them.
    """

    stores: str
    takes: Settings
    begin: Callable[[Reading, Settings], Fitting]
    within: Callable[[Reading, int], Sequence[Settings]]
    check: Callable[[Settings], Settings] = lambda settings: settings
