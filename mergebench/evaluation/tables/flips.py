"""Views of comparisons: two models task by task with the items that flipped, and the differences in an evaluation."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, zip_longest

from mergebench.errors import shown
from mergebench.evaluation.compare.comparison import Comparison, Flip, Pair
from mergebench.evaluation.compare.flips import Flips
from mergebench.evaluation.compare.rivals import Difference, Family, families
from mergebench.evaluation.results import Results
from mergebench.evaluation.tables.layout import MEASURE, NONE, SHARES, number, short_names
from mergebench.evaluation.tables.sheet import Cell, Sheet

RATES = ("task", "n", "old", "new", "difference", "p", "NFR", "PFR", "NFR_mc", "BTC", "expected")
ENDS = ("difference", "low", "high")  # CSV's columns of a difference
PERPLEXITIES = ("bits_per_byte", "byte_perplexity", "word_perplexity")  # an item's score is its bits per byte
ANSWER = 28  # letters of an answer that are shown in a table


def comparison_report(
    comparison: Comparison, *more: Sheet, items: int = 10, width: int | None = None, styled: bool = False
) -> str:
    """Rates, quadrants, more sheets and that many flipped items as text, at most `width` columns wide (None: as wide as
    needed)."""
    lines = [f" old: {shown(comparison.old)}", f" new: {shown(comparison.new)}"]
    for sheet in (*comparison_sheets(comparison), *more):
        lines += sheet.terminal(width=width, styled=styled)
    flipped = sum(len(pair.flips.lost) + len(pair.flips.won) for pair in comparison.pairs)
    if items and flipped:
        what = f"The first {items} of {flipped} items that flipped" if items < flipped else "Every item that flipped"
        across = max(MEASURE, *map(len, lines)) if width is None else width
        lines += ["", f" {what}, those lost first:", *_listed(comparison, items, across - 1)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def comparison_sheets(comparison: Comparison, *, named: bool = False) -> list[Sheet]:
    """Rates and quadrants; named: the legend says which models they are of."""
    rows = _rows(comparison)
    end = frozenset([len(comparison.pairs) - 1] if len(rows) > len(comparison.pairs) else [])  # before the pooled one
    rates = [list(map(Cell, row)) for row in rate_rows(comparison)]
    for (_, metric, found), row in zip(rows, rates, strict=True):
        row[4:6] = _difference_cell(found, unit_of(found, metric)), _p_cell(found.p)
    models = f"old: {comparison.old}; new: {comparison.new}. " if named else ""
    return [Sheet(RATES, rates, models + how_to_read(comparison), 1, end, {4: ENDS}), _quadrants(comparison)]


def items_sheet(comparison: Comparison, most: int) -> Sheet:
    """The first flipped items of every task by turns."""
    heads = ["task", "item", "", "old", "new", "right", "text"]
    rows = [
        (name, flip.item, flip.what, *_answers(flip), flip.gold or NONE, flip.text or NONE)
        for name, _, flip in _turns(comparison, most)
    ]
    return Sheet(heads, [[Cell(" ".join(str(cell).split())) for cell in row] for row in rows], "", len(heads))


def _answers(flip: Flip) -> tuple[str, str]:
    """What each said, or, where that is nothing, such as of a perplexity, its score."""
    return flip.old or number(flip.old_score, ""), flip.new or number(flip.new_score, "")


def difference_sheets(results: Results) -> list[Sheet]:
    """A table for each family of differences; the last one says how to read them."""
    found = families(results)
    names = short_names(results.models)
    sheets = [_family(one, names) for one in found]
    if sheets:
        sheets[-1] = replace(sheets[-1], legend=_family_legend(found, len(results.tasks)))
    return sheets


def _family(family: Family, names: dict[str, str]) -> Sheet:
    first = family.rows[0]
    adjusted = family.adjusted
    change = ["difference", "p", *(["Holm"] if adjusted else []), "lost", "won"]
    heads = {
        "baseline": [f"against {names[first.old]}" + (f": {family.task}, {_scores(first)}" if family.task else "")],
        "chosen": [f"{names[first.new]} against" + (f": {family.task}, {_scores(first)}" if family.task else "")],
        "edits": [f"{names[first.new]} against {names[first.old]}"],
        "best": ["model", "against the best other"],
    }[family.kind]
    rows = []
    for row, p in zip(family.rows, family.holm, strict=True):
        label = {
            "baseline": [names[row.new]],
            "chosen": [names[row.old]],
            "edits": [row.pairs[0].task],
            "best": [names[row.new], names[row.old]],
        }
        sides = (row.flips.lost, row.flips.won)
        lost, won = (
            Cell(f"{len(side)} ({_share(len(side) / row.flips.n)}%)", parts=(str(len(side)),)) for side in sides
        )
        holm = [_p_cell(p)] if adjusted else []
        cells = [_difference_cell(row.flips, unit_of(row.flips, row.metric)), _p_cell(row.flips.p), *holm, lost, won]
        rows.append([*map(Cell, label[family.kind]), *cells])
    return Sheet([*heads, *change], rows, "", len(heads), parts={len(heads): ENDS})


def _scores(row: Difference) -> str:
    """What the items of a task are counted in."""
    return "bits per byte" if row.metric in PERPLEXITIES else row.metric


def _family_legend(found: Sequence[Family], tasks: int) -> str:
    """How to read the differences, of all families at once."""
    rows = [row for family in found for row in family.rows]
    graded = [row.flips.both_right is None for row in rows]
    counts = sorted({row.flips.n for row in rows})
    of = f" of the {counts[0]:,} items" if len(counts) == 1 else " of the items"
    partly = any(len(row.pairs) < tasks for family in found if not family.task for row in family.rows)
    said = "Difference [95% interval]"
    if not all(graded):
        said += f": in the share{of} answered right, in %" + ("" if not partly or any(graded) else ", where they are")
    if any(graded):
        said += "; of other scores, their mean" if not all(graded) else f": in the mean{of}"
    tests = ["McNemar's test"] * (not all(graded)) + ["a paired bootstrap"] * any(graded)
    said += f"; above 0 is better. p: {' or '.join(tests)}"
    if any(family.adjusted for family in found):
        said += "; Holm: p adjusted for all rows of its table"
    return said + ". lost, won: items that became worse and better."


def rate_rows(comparison: Comparison) -> list[list[str]]:
    """`RATES` of each task and, of several, of all their items."""
    rows = []
    for name, metric, found in _rows(comparison):
        unit = unit_of(found, metric)
        values = (number(found.old, unit), number(found.new, unit), difference_of(found, unit), p_of(found.p))
        rates = map(_share, (found.nfr, found.pfr, found.nfr_mc, found.btc, found.nfr_expected))
        rows.append([name, str(found.n), *values, *rates])
    return rows


def _quadrants(comparison: Comparison) -> Sheet:
    rows = _rows(comparison)
    graded = any(found.both_right is None for _, _, found in rows)
    heads = ["task", "both right", "lost", "won", "both wrong", "of them differently"]
    cells = []
    for name, metric, found in rows:
        counts = (found.both_right, len(found.lost), len(found.won), found.both_wrong, found.wrong_differently)
        means = (None, None) if found.both_right is not None else (found.regression, found.gain)  # else 1 each
        sizes = [NONE if one is None else number(one, unit_of(found, metric)) for one in means]
        listed = [NONE if count is None else str(count) for count in counts]
        cells.append([Cell(text) for text in (name, *listed, *(sizes if graded else ()))])
    return Sheet([*heads, *(["mean loss", "mean gain"] if graded else [])], cells)


def _turns(comparison: Comparison, most: int) -> list[tuple[str, Pair, Flip]]:
    """The first flipped items, taken from every task by turns, the lost ones first; in the order of the tasks."""
    named = comparison.named
    sides = [
        [[(place, flip) for flip in pair.flipped if flip.what == what] for place, (_, pair) in enumerate(named)]
        for what in ("lost", "won")
    ]
    turns = [one for side in sides for one in chain.from_iterable(zip_longest(*side)) if one is not None]
    return [(*named[place], flip) for place, flip in sorted(turns[:most], key=lambda one: one[0])]


def _listed(comparison: Comparison, most: int, across: int) -> list[str]:
    """A line on each item, and below it what it asks."""
    lines = []
    for name, pair, flip in _turns(comparison, most):
        graded = pair.flips.both_right is None
        change = f", {number(flip.old_score, '')} → {number(flip.new_score, '')}" if graded else ""
        answers = f": {_shown(flip.old)} → {_shown(flip.new)}" if flip.old or flip.new else ""
        right = "" if flip.gold is None else f" (right: {_shown(flip.gold)})"
        about = f"{name}, {flip.item}: {flip.what}{change}{answers}{right}"
        lines += textwrap.wrap(shown(about), across, initial_indent=" ", subsequent_indent="     ")
        text = shown(flip.text or "")
        lines += textwrap.wrap(
            text, across, initial_indent="   ", subsequent_indent="   ", max_lines=3, placeholder=" …"
        )
    return lines


def how_to_read(comparison: Comparison) -> str:
    """A legend of `RATES`."""
    named = _rows(comparison)
    rows = [found for *_, found in named]
    units = [f"; {name}: {metric}" for name, metric, found in named if not found.share and metric not in name]
    tests = ["McNemar's test"] if any(found.both_right is not None for found in rows) else []
    tests += ["a paired bootstrap"] if any(found.both_right is None for found in rows) else []
    lower = "; above 0 is better also where lower values are" if _lower(comparison) else ""
    return (
        f"Shares in %{''.join(units)}. Difference [95% interval], p by {' or '.join(tests)}{lower}; NFR, PFR: "
        "items the new model lost and won; NFR_mc: lost, or wrong in another way; BTC: what is still right of what "
        "was; expected: the NFR if the two erred independently."
    )


def _lower(comparison: Comparison) -> bool:
    return any(pair.direction == "lower" for pair in comparison.pairs)


def _rows(comparison: Comparison) -> list[tuple[str, str, Flips]]:
    """Name, metric and flips of each task and, of several, of all their items."""
    rows = [(name, pair.metric, pair.flips) for name, pair in comparison.named]
    pooled = comparison.pooled_pairs
    if len(pooled) > 1 and comparison.pooled is not None:
        rows.append(("pooled", pooled[0].metric, comparison.pooled))
    return rows


def unit_of(found: Flips, metric: str) -> str:
    """Right answers are counted in percent, whatever the metric's name."""
    return "accuracy" if found.share else metric


def _difference_cell(found: Flips, unit: str) -> Cell:
    ends = (found.difference, *(found.interval or ()))
    return Cell(difference_of(found, unit), parts=tuple(f"{(100 if unit in SHARES else 1) * end:z.6g}" for end in ends))


def _p_cell(p: float | None) -> Cell:
    return Cell(p_of(p), parts=("" if p is None else f"{p:.3g}",))


def difference_of(found: Flips, unit: str) -> str:
    low_high = "" if found.interval is None else f" [{', '.join(signed(end, unit) for end in found.interval)}]"
    return signed(found.difference, unit) + low_high


def signed(value: float, unit: str) -> str:
    text = number(value, unit) if unit in SHARES else f"{value:.3g}"
    if text.strip("-0.") == "":  # what rounds to zero has no sign
        return text.lstrip("-")
    return text.replace("-", "−") if value < 0 else f"+{text}"


def p_said(p: float | None) -> str:
    """As a sentence has it: `p = 0.346`, `p < 0.001`, with spaces that do not break."""
    text = p_of(p)
    return f"p < {text[1:]}".replace(" ", "\u00a0") if text[0] == "<" else f"p = {text}".replace(" ", "\u00a0")


def p_of(p: float | None) -> str:
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _shown(text: str) -> str:
    """One line of an answer, cut."""
    line = " ".join(text.split())
    return line if len(line) <= ANSWER else line[: ANSWER - 1] + "…"
