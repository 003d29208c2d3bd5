"""Formats of deltas on disk: a format recognises its files or directories and reads them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.header import Header, TensorInfo


class Base(NamedTuple):
    """What a format knows of the model that its deltas change."""

    reference: str
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    changed: Collection[str] = ()  # its tensors that deltas change already


class Deltas(NamedTuple):
    """The deltas at a path, by the base's tensor names, and the files they are read from."""

    deltas: Mapping[str, Delta]
    headers: list[Header]
    made_on: str | None = None  # `content.identity` of the model that they were made on, if recorded
    first: Mapping[str, Delta] = {}  # deltas that come before those on the same tensors
    added: Mapping[str, TensorInfo] = {}  # tensors that the base does not have, or only as an alias of another
    removed: Collection[str] = ()  # tensors of the base that the model has no use for: another head
    config: Mapping[str, Any] = {}  # changes to config.json


@dataclass(frozen=True)
class Format:
    """A format and how it is recognised."""

    name: str
    what: str  # the word for it in messages: an adapter, a file of deltas
    claims: Callable[[Path], bool]
    read: Callable[[Path, Base], Deltas]
    alone: Callable[[Path], bool]  # whether such a path cannot also be a model


def delta_format(
    *, what: str, claims: Callable[[Path], bool], alone: Callable[[Path], bool] = lambda place: True
) -> Callable[[Callable[[Path, Base], Deltas]], Format]:
    """Declare a function `(path, base) -> Deltas` as a format.

    The function raises `ModelError` if the deltas do not belong to this base, `RunError` if a file is damaged. It must
    use every tensor it finds, or refuse it by name. `what`: the word for such a path in messages. `claims`: whether a
    path is of this format, judged by file names or a header. `alone`: whether such a path cannot also be a model; if it
    can, it is read as a model before the first `+`.
    """

    def declare(function: Callable[[Path, Base], Deltas]) -> Format:
        return Format(function.__name__, what, claims, function, alone)

    return declare
