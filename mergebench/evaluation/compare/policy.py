"""Policies of a gate, read strictly from YAML.

max_drop: 1               # points of accuracy that each task may lose
max_nfr: 0.05             # share of its items
inconclusive: pass        # or block: where the items cannot tell
total: {max_drop: 0.5}    # all items together
tasks:
  news: {max_drop: 2}     # must have been measured
  poems: {max_drop: 0.1}  # of other scores than right and wrong: in the metric's unit
  jokes: {advisory: true} # judged and shown; decides nothing
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoint.reference import looked_in
from mergebench.errors import RecipeError, did_you_mean
from mergebench.evaluation.compare.comparison import Comparison
from mergebench.evaluation.compare.verdict import POINT, Limits, Policy
from mergebench.recipe.positions import Loc, Places, show
from mergebench.recipe.yaml import find, parse, text_of

LIMITS = ("max_drop", "max_nfr")
SHAPE = "such as max_drop: 1, max_nfr: 0.05, tasks: {news: {max_drop: 2}}"


def load_policy(source: str | os.PathLike[str], comparison: Comparison) -> Policy:
    """Read a policy. A `max_drop` is in points where a task's answers are right or wrong, which the comparison says."""
    path = find(source, ())
    if path is None:
        raise RecipeError(f"no such policy: {os.fspath(source)}", looked_in(os.fspath(source)))
    return _Reader(path, comparison).policy()


class _Reader:
    """Reads one policy."""

    def __init__(self, path: Path, comparison: Comparison) -> None:
        self.places = Places({(): str(path)})
        self.data = parse(text_of(path), str(path), self.places)
        self.shares: dict[str, set[bool]] = {}  # whether a name's scores are shares of right answers
        for label, pair in comparison.named:
            for name in (label, pair.task):
                self.shares.setdefault(name, set()).add(pair.flips.share)
        self.labels = [label for label, _ in comparison.named]

    def policy(self) -> Policy:
        data = self.mapping(self.data, (), (*LIMITS, "inconclusive", "total", "tasks"))
        word = data.get("inconclusive", "pass")
        if word not in ("pass", "block"):
            raise self.places.error(("inconclusive",), f"must be pass or block, got {show(word)}")
        tasks = data.get("tasks") or {}
        if not isinstance(tasks, dict):
            raise self.places.error(("tasks",), f"must be a mapping of names, got {show(tasks)}", SHAPE)
        single = {str(name): self.limits(one or {}, ("tasks", name), str(name)) for name, one in tasks.items()}
        total = self.limits(data["total"], ("total",), None, more=()) if data.get("total") is not None else None
        each = self.limits({key: data[key] for key in LIMITS if key in data}, (), None, more=())
        if not (single or total or any(key in data for key in LIMITS)):
            raise self.places.error((), "it limits nothing", SHAPE)
        return Policy(each, single, total, word == "block")

    def limits(self, value: Any, loc: Loc, task: str | None, more: tuple[str, ...] = ("advisory",)) -> Limits:
        given = self.mapping(value, loc, (*LIMITS, *more))
        shares = self.shares.get(task or "", {True})
        drop = self.number(given, "max_drop", loc, 100 if shares == {True} else math.inf)
        if drop is not None and len(shares) > 1:
            own = ", ".join(f"'{label}'" for label in self.labels if label.startswith(f"{task} ("))
            raise self.places.error(
                (*loc, "max_drop"), "its metrics have several units", f"bound them one by one: {own}"
            )
        share = self.number(given, "max_nfr", loc, 1)
        advisory = given.get("advisory", False)
        if not isinstance(advisory, bool):
            raise self.places.error((*loc, "advisory"), f"must be true or false, got {show(advisory)}")
        return Limits(drop if drop is None or shares != {True} else drop * POINT, share, advisory)

    def number(self, given: Mapping[str, Any], key: str, loc: Loc, most: float) -> float | None:
        value = given.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            upto = "at least 0" if most == math.inf else f"from 0 to {most:g}"
            raise self.places.error((*loc, key), f"must be a number {upto}, got {show(value)}")
        return float(value)

    def mapping(self, value: Any, loc: Loc, keys: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.places.error(loc, f"a policy is a mapping, got {show(value)}", SHAPE)
        for key in value:
            if key not in keys:
                raise self.places.error((*loc, key), "no such key", did_you_mean(str(key), keys))
        return value
