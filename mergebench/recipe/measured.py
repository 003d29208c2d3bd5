"""The `evaluate:` key of a recipe: what is measured, and methods to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergebench.recipe import own, parameters
from mergebench.recipe.positions import Loc, Places


@dataclass(frozen=True)
class Baseline:
    """A method to compare with, at its defaults except for the parameters given here."""

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """`ties`, or `ties density 0.2`."""
        own = self.method.rpartition(":")[2]  # of FILE.py:NAME
        return " ".join([own, *(f"{name} {value}" for name, value in self.parameters.items())])

    def to_plain(self) -> str | dict[str, Any]:
        return {self.method: dict(self.parameters)} if self.parameters else self.method


@dataclass(frozen=True)
class Evaluation:
    """What to measure: a suite (a file, or written out), and methods to merge with for comparison."""

    suite: str | dict[str, Any]
    baselines: tuple[Baseline, ...] = ()


def evaluation(found: Mapping[str, Any] | None, places: Places) -> Evaluation | None:
    """The evaluate: key, its baselines' parameters checked."""
    if found is None:
        return None
    baselines = []
    for i, written in enumerate(found.get("baselines", ())):
        loc: Loc = ("evaluate", "baselines", i)
        name, given = next(iter(written.items())) if isinstance(written, dict) else (written, {})
        method = own.get(name, loc, places)
        if not isinstance(given, dict):
            raise places.error((*loc, name), "must be a mapping of parameters", "write it as {ties: {density: 0.2}}")
        baselines.append(Baseline(name, parameters.check(method, given, (*loc, name), places)[0]))
    return Evaluation(found["suite"], tuple(baselines))
