"""A model as it was before its edits, in memory: the rows that its patches keep are put back as it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergebench.checkpoint import Model
from mergebench.editing.patches import Change, Patch


@dataclass(frozen=True)
class Unedited:
    """An edited model without its edits, bit for bit what they were made on."""

    model: Model
    patches: Sequence[Patch]  # in the order they were made

    @property
    def reference(self) -> str:
        return f"{self.model.reference} unedited"

    @property
    def side_directory(self) -> Path:
        return self.model.side_directory

    def state_dict(self) -> dict[str, torch.Tensor]:
        """float32 tensors by their names in the files; `ModelError` where a patch is not of this model."""
        tensors = self.model.state_dict()
        for patch in reversed(self.patches):  # a row that two edits changed goes back through both
            for name in patch.names:
                patch.neurons(self.model, name)
                _put_back(tensors[name], patch.change(name))
        return tensors


def _put_back(tensor: Tensor, change: Change) -> None:
    """Write the vectors before an edit into a tensor [..., rows, width]; columns: [..., width, rows]."""
    matrices = tensor.view(-1, *tensor.shape[-2:])  # one an expert
    vectors = matrices.mT if change.transposed else matrices
    rows = vectors.shape[1]
    vectors[change.numbers // rows, change.numbers % rows] = change.originals.to(tensor.dtype)
