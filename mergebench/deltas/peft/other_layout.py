"""Deltas for a model whose files have another layout: as transformers holds it in memory, or as it is published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mergebench.checkpoint.assembled import assemble
from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.format import Base, Deltas, Format
from mergebench.checkpoint.layouts import as_published, in_memory, inverse
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.moved import move
from mergebench.errors import ModelError


def read_in_another_layout(known: Format, place: Path, model: Model) -> Deltas | None:
    """The deltas at a path, read against the model's tensors in the layouts that transformers knows, as deltas on its
    own; None if they fit in none."""
    for make in (in_memory, as_published):
        laid = make(model.tensors, model.config)
        used = {box.source for one in laid.values() for box in one.boxes}
        tensors = {name: info for name, info in model.tensors.items() if name not in used}
        tensors |= {name: assemble(name, one, model.tensors) for name, one in laid.items()}
        changed = {name for name, one in laid.items() if any(box.source in model.deltas for box in one.boxes)}
        try:
            read = known.read(place, Base(model.reference, tensors, model.config, changed | model.deltas.keys()))
        except ModelError:
            continue
        wanted = inverse(laid, {name: info.shape for name, info in model.tensors.items()})

        def moved(deltas: Mapping[str, Delta]) -> dict[str, Delta]:
            kept = {name: delta for name, delta in deltas.items() if name not in laid}  # noqa: B023
            several = move({name: (delta,) for name, delta in deltas.items()}, wanted, tensors)  # noqa: B023
            return kept | {name: one for name, (one,) in several.items()}

        return read._replace(deltas=moved(read.deltas), first=moved(read.first))
    return None
