"""An edit as requested by a recipe or a command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergebench.parameters import param, parameters_of


@dataclass(frozen=True)
class Wanted:
    """An edit by its name, a probe, and the given parameters."""

    edit: str
    probe: str = param(help="the probe's file, as `mergebench probe fit` writes it")
    direction: str = param("row1", "what of the probe is added: row1, diff, unit-diff or mean-diff")
    target: str = param("", "whose rows: gate_proj, residual, another role, a glob; by default the edit's own")
    layers: str = param("all", "which layers: all, 0-15, '3,5,7', '!0-7'; negative ones count from the end")
    values: Mapping[str, Any] = field(default_factory=dict)  # the edit's own

    def to_plain(self) -> dict[str, Any]:
        """As a recipe spells it."""
        return {"edit": self.edit, **{key: getattr(self, key) for key in COMMON}, **self.values}


OF_ANY = {name: parameter for name, parameter in parameters_of(Wanted).items() if parameter.help}
COMMON = {name: parameter.help for name, parameter in OF_ANY.items()}
