"""What a measured model takes on disk: the bytes of its own tensors, as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergebench.networks.loadable import LoadableModel


def bytes_of(model: LoadableModel | Mapping[str, LoadableModel]) -> int | None:
    """Of a model on a base (`BASE+ADAPTER`), what is added to the base; of one for each task, what they have together.
    Of a merge in memory, what it would take. None where it is not known."""
    from mergebench.checkpoint.model import Model
    from mergebench.deltas import verbs  # torch comes with it

    models = list(model.values()) if isinstance(model, Mapping) else [model]
    known = [one for one in models if isinstance(one, Model)]
    if len(known) < len(models):
        tensors = getattr(model, "tensors", None)
        return sum(tensor.nbytes for tensor in tensors.values()) if isinstance(tensors, dict) else None
    added = [delta for one in known for deltas in one.deltas.values() for delta in deltas]
    beside = sum(file.stat().st_size for file in {file for one in known for file in one.modules})
    if added or beside:
        return verbs.size(added).nbytes + beside
    own = {(info.file, info.offset, name): info.nbytes for one in known for name, info in one.tensors.items()}
    return sum(own.values())
