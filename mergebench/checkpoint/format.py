"""How deltas lie on disk: a format reads one sort of place, and says which places are its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.header import Header, TensorInfo


class Base(NamedTuple):
    """What a format must know of the model that its deltas are for."""

    reference: str
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]


class Deltas(NamedTuple):
    """The deltas that a place holds, by the base's names, and the files they are read from."""

    deltas: Mapping[str, Delta]
    headers: list[Header]
    made_on: str | None = None  # `content.identity` of the model that they were made on, where the place says so


@dataclass(frozen=True)
class Format:
    """A format and how it is told from others."""

    name: str
    what: str  # what a place of this format is called in a message: an adapter, a patch
    claims: Callable[[Path], bool]
    read: Callable[[Path, Base], Deltas]
    alone: Callable[[Path], bool]  # whether such a place can be no model as well


def delta_format(
    *, what: str, claims: Callable[[Path], bool], alone: Callable[[Path], bool] = lambda place: True
) -> Callable[[Callable[[Path, Base], Deltas]], Format]:
    """Declare a function `(path, base) -> Deltas` as a format.

    The function raises `ModelError` where the deltas do not belong to this base, `RunError` where a file is damaged;
    every tensor it finds is consumed, or refused by name. `what`: what such a place is called in messages. `claims`:
    whether a place is of this format, told from a look at names or a header. `alone`: whether a place that is can be no
    model as well; one that can is a model where it stands before the first `+`.
    """

    def declare(function: Callable[[Path, Base], Deltas]) -> Format:
        return Format(function.__name__, what, claims, function, alone)

    return declare
