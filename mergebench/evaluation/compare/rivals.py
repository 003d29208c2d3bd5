"""Which models' differences are shown, in families that are read together.

Every model against the baseline; what was merged against the best other. Tasks whose scores cannot be pooled with the
others', such as a perplexity beside accuracies, make a family each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mergebench.evaluation.compare.comparison import Comparison, Pair, against, compared
from mergebench.evaluation.compare.flips import Flips
from mergebench.evaluation.compare.inference import holm
from mergebench.evaluation.results import Results


class Difference(NamedTuple):
    """A new model against an old one, on the items of one task or of several."""

    old: str
    new: str
    pairs: tuple[Pair, ...]
    flips: Flips

    @property
    def metric(self) -> str:
        return self.pairs[0].metric


@dataclass(frozen=True)
class Family:
    """Differences that are read together: of several models, p is adjusted for all of them."""

    kind: str  # baseline: against it; chosen: that model against each; best: each against the best other; edits: one
    # model's, task by task
    rows: tuple[Difference, ...]
    task: str = ""  # where the rows are of one task: its name

    @property
    def adjusted(self) -> bool:
        """Whether there are several models, of which some may look good by chance."""
        return self.kind != "edits" and len(self.rows) > 1

    @property
    def holm(self) -> list[float | None]:
        """Each row's p, adjusted by Holm's method."""
        return holm([row.flips.p for row in self.rows])


def families(results: Results) -> list[Family]:
    """All that there is to show, without empty families."""
    first = _first(results)
    return _families(results, first, rivals(results, first))


def _first(results: Results) -> list[Comparison]:
    """Every model against the baseline, or the chosen one against every other."""
    chosen = results.made.get("chosen")
    if chosen not in results.models:
        return against(results)
    return [one for other in results.models for one in compared(results, other, [chosen])]


def _families(results: Results, first: list[Comparison], best: list[Comparison]) -> list[Family]:
    roles = {record.model: record.role for record in results.records}
    kind = "chosen" if results.made.get("chosen") in results.models else "baseline"
    edited = [one for one in first if one.old in before(results) and roles[one.new] == "merged"]
    if edited:
        rows = [Difference(one.old, one.new, (pair,), pair.flips) for one in edited[:1] for pair in one.pairs]
        found = [Family("edits", tuple(rows))]
    else:
        found = [Family(kind, _pooled(first))]
        apart: dict[str, list[Difference]] = {}
        for one in first:
            for pair in one.pairs:
                if pair not in one.pooled_pairs:
                    apart.setdefault(pair.task, []).append(Difference(one.old, one.new, (pair,), pair.flips))
        found += [Family(kind, tuple(rows), task) for task, rows in apart.items()]
    found.append(Family("best", _pooled(best)))
    return [one for one in found if one.rows]


def rivals(results: Results, first: list[Comparison]) -> list[Comparison]:
    """What was merged against the best of the other merges and baselines, or without any of the inputs; where nothing
    was merged, each model against the best other.

    The best has the highest mean over the items that all answered. A pair is there once, the better model as the new
    one, and those of `first` (against the baseline) are left out. None where somebody chose the baseline.
    """
    if not first or ("baseline" in results.made and not before(results)):
        return []
    most = max((one.pooled.n for one in first if one.pooled is not None), default=0)
    gains = {first[0].old: 0.0} | {
        one.new: one.pooled.difference for one in first if one.pooled is not None and one.pooled.n == most
    }
    roles = {record.model: record.role for record in results.records}
    known = [model for model in results.models if model in gains and model not in before(results)]
    merges = [model for model in known if roles[model] == "merged"]
    made = [model for model in known if roles[model] in ("merged", "baseline")]
    field = made if len(made) > 1 else [model for model in known if roles[model] != "base"]
    ranked = sorted(field, key=lambda model: -gains[model])
    seen = {frozenset((one.old, one.new)) for one in first}
    found = []
    for model in [one for one in ranked if one in (merges or field)]:
        other = next((one for one in ranked if one != model), model)
        if other != model and frozenset((model, other)) not in seen:
            seen.add(frozenset((model, other)))
            found += compared(results, other, [model])
    return sorted(found, key=lambda one: results.models.index(one.new))


def before(results: Results) -> Mapping[str, Any]:
    """Models before their edits, with what was done to them."""
    found: Mapping[str, Any] = results.made.get("unedited", {})
    return found


def documents(results: Results) -> list[dict[str, Any]]:
    """Every comparison with all its numbers, ready for JSON; `p_holm`: the pooled p, adjusted within its family."""
    first = _first(results)
    best = rivals(results, first)
    adjusted = {
        (row.old, row.new): p
        for family in _families(results, first, best)
        if family.kind != "edits" and not family.task
        for row, p in zip(family.rows, family.holm, strict=True)
    }
    return [one.to_dict(items=False) | {"p_holm": adjusted.get((one.old, one.new))} for one in [*first, *best]]


def _pooled(comparisons: list[Comparison]) -> tuple[Difference, ...]:
    return tuple(Difference(c.old, c.new, c.pooled_pairs, c.pooled) for c in comparisons if c.pooled is not None)
