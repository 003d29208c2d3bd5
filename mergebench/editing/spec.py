"""An edit as a recipe or a command asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

COMMON = {
    "probe": "the probe's file, as `mergebench probe fit` writes it",
    "direction": "what of the probe is added: row1, diff, unit-diff or mean-diff",
    "target": "which matrices' rows: gate_proj, another role, or a glob of tensor names",
    "layers": "which layers: all, 0-15, '3,5,7', '!0-7'; negative ones count from the end",
}


@dataclass(frozen=True)
class Wanted:
    """An edit by its name, a probe, and the parameters that are given."""

    edit: str
    probe: str
    direction: str = "row1"
    target: str = "gate_proj"
    layers: str = "all"
    values: Mapping[str, Any] = field(default_factory=dict)  # the edit's own

    def to_plain(self) -> dict[str, Any]:
        """As a recipe spells it."""
        return {"edit": self.edit, **{key: getattr(self, key) for key in COMMON}, **self.values}
