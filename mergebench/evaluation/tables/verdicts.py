"""Verdicts as a table, and as the sentences of a gate."""

from __future__ import annotations

from mergebench.evaluation.compare.verdict import Judged, Judgement, named
from mergebench.evaluation.tables.flips import difference_of, signed, unit_of
from mergebench.evaluation.tables.layout import NONE, number
from mergebench.evaluation.tables.sheet import Cell, Sheet

HEADS = ("task", "verdict", "difference", "allowed", "can show")
LEGEND = (
    "BLOCK: worse beyond chance, by more than is allowed; WARN: worse beyond chance, within it; PASS: a larger drop is "
    "excluded; INCONCLUSIVE: so few items cannot tell. can show: the smallest difference that so many items show, four "
    "times in five."
)


def verdict_sheet(judgement: Judgement) -> Sheet:
    """A row for each task."""
    whole = f"All together: {judgement.verdict}. " if len(judgement.rows) > 1 else ""
    return Sheet(HEADS, [[Cell(text) for text in _row(row)] for row in judgement.rows], whole + LEGEND, 2)


def _row(row: Judged) -> list[str]:
    word = NONE if row.verdict is None else row.verdict
    said = f"{word} (advisory)" if row.limits.advisory else word
    if row.flips is None:
        return [row.task, said, "not measured", NONE, NONE]
    unit = unit_of(row.flips, row.metric)
    show = NONE if row.flips.detectable is None else number(row.flips.detectable, unit)
    return [row.task, said, difference_of(row.flips, unit), _allowed(row), show]


def _allowed(row: Judged) -> str:
    assert row.flips is not None
    unit = unit_of(row.flips, row.metric)
    limits = row.limits
    drop = [] if limits.max_drop is None else [signed(-limits.max_drop, unit) if limits.max_drop else "0"]
    return ", ".join([*drop, *([] if limits.max_nfr is None else [f"NFR {100 * limits.max_nfr:g}"])]) or NONE


def failure(judgement: Judgement) -> str:
    """Why a gate is closed."""
    if judgement.verdict == "BLOCK":
        return f"BLOCK: {'; '.join(why for row in named(judgement.rows, 'BLOCK') for why in _reasons(row))}"
    return f"INCONCLUSIVE: {_undecided(judgement)}"


def passes(judgement: Judgement) -> list[str]:
    """What a gate says that is open."""
    lines = ["passed: every task is within its limits"]
    for row in named(judgement.rows, "WARN"):
        assert row.flips is not None
        change = difference_of(row.flips, unit_of(row.flips, row.metric))
        lines.append(f"warning: {row.task} is worse beyond chance, within its limit: {change}")
    if judgement.verdict == "INCONCLUSIVE":
        lines[0] = f"passed, but inconclusive: {_undecided(judgement)}"
    return lines


def _reasons(row: Judged) -> list[str]:
    if row.flips is None:
        return [f"{row.task}: not measured"]
    unit, limits, lines = unit_of(row.flips, row.metric), row.limits, []
    if "drop" in row.reasons and limits.max_drop is not None:
        allowed = "none is allowed" if not limits.max_drop else f"{signed(-limits.max_drop, unit)} is allowed"
        lines.append(f"{row.task}: {difference_of(row.flips, unit)}, {allowed}")
    if "nfr" in row.reasons and limits.max_nfr is not None:
        share = f"{100 * row.flips.nfr:.1f}% ({len(row.flips.lost)} of {row.flips.n})"
        lines.append(f"{row.task}: NFR {share}, at most {100 * limits.max_nfr:g}% is allowed")
    return lines


def _undecided(judgement: Judgement) -> str:
    rows = [row for row in named(judgement.rows, "INCONCLUSIVE") if row.flips is not None]
    said = []
    for row in rows:
        assert row.flips is not None
        unit = unit_of(row.flips, row.metric)
        show = "" if row.flips.detectable is None else f" show a difference of {number(row.flips.detectable, unit)}"
        said.append(f"{row.task} ({row.flips.n:,} items{show or ' show nothing'}, {_allowed(row)} is allowed)")
    return "too few items to tell: " + ", ".join(said)
