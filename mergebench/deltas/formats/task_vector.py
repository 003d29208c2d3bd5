"""A task vector, as `mergebench task-vector` writes it: a checkpoint whose tensors are differences."""

from __future__ import annotations

from pathlib import Path

from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.format import Base, Deltas, delta_format
from mergebench.checkpoint.header import read_header
from mergebench.checkpoint.model import holds_vector, open_directory
from mergebench.checkpoint.names import match
from mergebench.checkpoint.naming import find_weights
from mergebench.deltas.dense import dense
from mergebench.errors import MergebenchError, ModelError


def _claims(place: Path) -> bool:
    """Whether the files at a path are marked as differences."""
    try:
        if place.is_dir():
            return find_weights(place) is not None and holds_vector(open_directory(str(place), place))
        return place.suffix == ".safetensors" and place.is_file() and holds_vector([read_header(place)])
    except MergebenchError:
        return False


@delta_format(what="a task vector", claims=_claims, alone=lambda place: False)
def task_vector(place: Path, base: Base) -> Deltas:
    """What a task vector adds to each float tensor; `ModelError` where it is for another base."""
    headers = open_directory(str(place), place) if place.is_dir() else [read_header(place)]
    tensors = {tensor.name: tensor for header in headers for tensor in header.tensors if tensor.is_float}
    renamed = match({name: info.shape for name, info in tensors.items()}, base.tensors)
    deltas: dict[str, Delta] = {}
    for stored, info in tensors.items():
        name = renamed.get(stored, stored)
        target = base.tensors.get(name)
        if target is None or target.shape != info.shape or not target.is_float:
            has = "does not have it" if target is None else f"has {target.dtype} {list(target.shape)}"
            hint = "name the base that the vector was taken from before the '+'"
            raise ModelError(f"{place}: {stored}: the task vector changes {list(info.shape)}, base {has}", hint)
        deltas[name] = dense.on(target.shape, {"values": info})
    return Deltas(deltas, headers)
