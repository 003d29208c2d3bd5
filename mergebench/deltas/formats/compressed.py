"""A compressed model as `mergebench compress` writes it, or a compressed task vector: PELA (arXiv:2310.10700).

    NAME.0.weight [r, in], NAME.1.weight [out, r], NAME.1.bias      in the place of NAME.weight and NAME.bias
    compress.json                                                   {"tensors": {NAME.weight: {"shape", "rank"}}, ...}

`BASE+DIR` is the model with its factors multiplied, or the base with the task vector.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.documents import document
from mergebench.checkpoint.format import Base, Deltas, delta_format
from mergebench.checkpoint.kind import Part
from mergebench.checkpoint.model import holds_factors, open_directory
from mergebench.deltas.dense import dense
from mergebench.deltas.factored import factored
from mergebench.deltas.low_rank import low_rank
from mergebench.errors import MergebenchError, ModelError

RECORD = "compress.json"
_HINT = "name the model that was compressed before the '+'"


class Record(TypedDict):
    """What is read of compress.json."""

    tensors: dict[str, Entry]


class Entry(TypedDict, total=False):
    """A layer: its shape, and its rank if it is factored."""

    shape: list[int]
    rank: int


class Names(NamedTuple):
    """What a factored layer's tensors are called, as in `Sequential(Linear(in, r, bias=False), Linear(r, out))`."""

    inner: str  # [r, in]
    outer: str  # [out, r]
    bias: str  # of the outer one


def names(weight: str) -> Names:
    """`NAME.0.weight`, `NAME.1.weight` and `NAME.1.bias` of `NAME.weight`, as the authors' code writes them."""
    module = weight.removesuffix(".weight")
    return Names(f"{module}.0.weight", f"{module}.1.weight", f"{module}.1.bias")


def read_record(directory: Path) -> dict[str, Any]:
    """compress.json of a compressed model; `ModelError` if the directory holds none."""
    what = f"{directory}: no compressed model: it has no {RECORD}"
    missing = ModelError(what, "name a directory that `mergebench compress` wrote")
    record: dict[str, Any] = document(directory / RECORD, Record, missing=missing)
    return record


def _claims(place: Path) -> bool:
    if not (place / RECORD).is_file():
        return False
    try:
        return holds_factors(open_directory(str(place), place))
    except MergebenchError:
        return False


@delta_format(what="a compressed model", claims=_claims)
def compressed(directory: Path, base: Base) -> Deltas:
    """The products of the factors, and every other tensor, in the place of the base's."""
    about, headers = read_record(directory), open_directory(str(directory), directory)
    stored = {tensor.name: tensor for header in headers for tensor in header.tensors}
    vector, in_out = bool(about.get("task_vector")), about.get("stored") == "[in, out]"
    deltas: dict[str, Delta] = {}

    def target(name: str) -> tuple[int, ...]:
        info = base.tensors.get(name)
        if info is None or not info.is_float:
            raise ModelError(f"{directory}: {name}: {base.reference} has no such weight", _HINT)
        return info.shape

    biases = {}
    for name in (name for name, entry in about["tensors"].items() if "rank" in entry):
        inner, outer, bias = names(name)
        lost = next((part for part in (inner, outer) if part not in stored), None)
        if lost is not None:
            raise ModelError(f"{directory}: '{lost}' is missing, which {RECORD} names")
        b, a = (Part(stored.pop(part), in_out) for part in ((inner, outer) if in_out else (outer, inner)))
        try:
            deltas[name] = (low_rank if vector else factored).on(target(name), {"b": b, "a": a})
        except ValueError as error:
            raise ModelError(f"{directory}: {name}: {error}", _HINT) from None
        biases[bias] = f"{name.removesuffix('.weight')}.bias"
    for key, info in stored.items():
        if info.is_float:
            name = biases.get(key, key)
            if info.shape != target(name):
                raise ModelError(f"{directory}: {name}: {list(info.shape)}, the base has {list(target(name))}", _HINT)
            deltas[name] = dense.on(info.shape, {"values": info}, replace=not vector)
    return Deltas(deltas, headers, None if vector else about.get("identity"))
