"""A model before its edits: the original rows in its patches are restored while it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mergebench.checkpoint import Model
from mergebench.checkpoint.format import Base
from mergebench.editing.patches import Patch


def unedited(model: Model, patches: Sequence[Patch]) -> Model:
    """An edited model without its edits, bit for bit the original; patches: in the order of the edits.

    Raises `ModelError` if a patch does not belong to this model.
    """
    base, deltas = Base(model.reference, model.tensors, {}), dict(model.deltas)
    for patch in reversed(patches):  # a row that two edits changed is reverted twice
        for name in patch.names:
            undo = patch.deltas.undo(name, patch.deltas.on(name, base))
            deltas[name] = (*deltas.get(name, ()), undo)
    return replace(model, reference=f"{model.reference} unedited", deltas=deltas)
