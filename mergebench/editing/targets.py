"""Which matrices an edit's rows are in (for now: gate_proj)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergebench.checkpoint.header import TensorInfo
from mergebench.errors import RecipeError


@dataclass(frozen=True)
class Target:
    """Rows of one matrix."""

    tensor: str
    layer: int
    first: int
    stop: int
    step: int
    transposed: bool

    @property
    def numbers(self) -> range:
        return range(self.first, self.stop, self.step)


def find_targets(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], role: str, width: int | None, layers: str | None
) -> list[Target]:
    found = []
    for name, info in tensors.items():
        if m := re.search(rf"layers\.(\d+)\..*{role}.weight", name):
            found.append(Target(name, int(m[1]), 0, info.shape[0], 1, False))
    if not found:
        raise RecipeError(f"target: nothing matches '{role}'")
    return sorted(found, key=lambda t: t.layer)
