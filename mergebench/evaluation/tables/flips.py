"""Views of comparisons: two models task by task with the items that flipped, and every model against the baseline."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

from mergebench.checkpoint.card import escape
from mergebench.errors import shown
from mergebench.evaluation.compare.comparison import Comparison, Pair, against
from mergebench.evaluation.compare.flips import Flips
from mergebench.evaluation.tables.layout import NONE, SHARES, literal, markdown_line, number, render, short_names

if TYPE_CHECKING:
    from rich.table import Table

    from mergebench.evaluation.results import Results

RATES = ("task", "n", "old", "new", "difference", "p", "NFR", "PFR", "NFR_mc", "BTC", "expected")
CHANGE = ("difference", "p", "lost", "won")
EACH_TASK = (
    "Difference: mean over the task's items [95% interval], above 0 is better; p: paired bootstrap, of right and wrong "
    "answers McNemar's exact test; lost, won: items that became worse and better."
)
ANSWER = 28  # letters of an answer that are shown


def comparison_report(
    comparison: Comparison, *, items: int = 10, width: int | None = None, styled: bool = False
) -> str:
    """Rates, quadrants and that many flipped items as text, at most `width` columns wide (None: as wide as needed)."""
    lines = [f" old: {shown(comparison.old)}", f" new: {shown(comparison.new)}"]
    lines += render(_rates(comparison), how_to_read(comparison), width=width, styled=styled)
    lines += render(_quadrants(comparison), "", width=width, styled=styled)
    flipped = sum(len(pair.flips.lost) + len(pair.flips.won) for pair in comparison.pairs)
    if items and flipped:
        what = f"{items} of {flipped} items that flipped" if items < flipped else "every item that flipped"
        lines += render(_items(comparison, items), f"{what}, those lost first", width=width, styled=styled)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def against_table(results: Results) -> tuple[Table, str] | None:
    """A table of every other model against the baseline, or of an edited model, task by task, against itself before the
    edits, and its legend; None if nothing can be compared."""
    heads, rows, legend = _against(results)
    if not rows:
        return None
    out = _table(*heads, left=2)
    for (name, role, *cells), after in zip_longest(rows, rows[1:]):
        _add(out, name, role, *cells, end=after is not None and after[1] != role)
    return out, legend


def against_markdown(results: Results) -> str:
    """The same as a GitHub table; empty where nothing can be compared."""
    heads, rows, legend = _against(results)
    if not rows:
        return ""
    lines = [map(escape, heads), ["---", "---", *["---:"] * (len(heads) - 2)], *(map(escape, row) for row in rows)]
    return "\n".join([*map(markdown_line, lines), "", escape(legend)])


def _against(results: Results) -> tuple[list[str], list[list[str]], str]:
    """Heads, rows and legend."""
    names = short_names(results.models)
    roles = {record.model: record.role for record in results.records}
    rows, counts, graded, partly = [], set(), False, False
    comparisons = against(results)
    for comparison in comparisons:
        if comparison.old in results.made.get("unedited", {}) and roles[comparison.new] == "merged":
            rows = [[name, "", *_change(pair.flips, pair.metric)] for name, pair in _named(comparison)]
            return [f"{names[comparison.new]} against {names[comparison.old]}", "", *CHANGE], rows, EACH_TASK
        pooled = comparison.pooled
        if pooled is None:
            continue
        rows.append([names[comparison.new], roles[comparison.new], *_change(pooled, comparison.pooled_pairs[0].metric)])
        counts.add(pooled.n)
        graded |= pooled.both_right is None
        partly |= len(comparison.pooled_pairs) < len(results.tasks)
    heads = [f"against {names[comparisons[0].old]}" if rows else "", "", *CHANGE]
    return heads, rows, _against_legend(counts, graded, partly)


def _change(found: Flips, metric: str) -> list[str]:
    """Cells of `CHANGE`."""
    lost, won = (f"{len(side)} ({_share(len(side) / found.n)} %)" for side in (found.lost, found.won))
    return [difference_of(found, unit_of(found, metric)), p_of(found.p), lost, won]


def _against_legend(counts: set[int], graded: bool, partly: bool) -> str:
    if graded:
        return (
            "Difference: mean over the items [95% interval], above 0 is better; p: paired bootstrap; lost, won: items "
            "that became worse and better."
        )
    items = f"{min(counts)} items" if len(counts) == 1 else "items"
    tasks = " of the tasks with right and wrong answers" if partly else ""
    return (
        f"Difference: in the share of right answers, in %, over the {items}{tasks} [95% interval]; p: McNemar's "
        "exact test; lost: items right before and wrong now (NFR); won: the other way round (PFR)."
    )


def _rates(comparison: Comparison) -> Table:
    out = _table(*RATES)
    rows = rate_rows(comparison)
    for place, row in enumerate(rows, 1):
        _add(out, *row, end=place == len(comparison.pairs) < len(rows))  # before the pooled one
    return out


def rate_rows(comparison: Comparison) -> list[list[str]]:
    """`RATES` of each task and, of several, of all their items."""
    rows = []
    for name, metric, found in _rows(comparison):
        unit = unit_of(found, metric)
        values = (number(found.old, unit), number(found.new, unit), difference_of(found, unit), p_of(found.p))
        rates = map(_share, (found.nfr, found.pfr, found.nfr_mc, found.btc, found.nfr_expected))
        rows.append([name, str(found.n), *values, *rates])
    return rows


def _quadrants(comparison: Comparison) -> Table:
    rows = _rows(comparison)
    graded = any(found.both_right is None for _, _, found in rows)
    heads = ("mean loss", "mean gain") if graded else ()
    out = _table("task", "both right", "lost", "won", "both wrong", "of them differently", *heads)
    for name, metric, found in rows:
        counts = (found.both_right, len(found.lost), len(found.won), found.both_wrong, found.wrong_differently)
        sizes = (found.regression, found.gain) if graded else ()
        cells = [NONE if size is None else number(size, unit_of(found, metric)) for size in sizes]
        _add(out, name, *(NONE if count is None else str(count) for count in counts), *cells)
    return out


def _items(comparison: Comparison, most: int) -> Table:
    """Flipped items of every task by turns, the lost ones first."""
    named = _named(comparison)
    lost = [[(place, "lost", item) for item in pair.flips.lost] for place, (_, pair) in enumerate(named)]
    won = [[(place, "won", item) for item in pair.flips.won] for place, (_, pair) in enumerate(named)]
    turns = [one for side in (lost, won) for one in chain.from_iterable(zip_longest(*side)) if one is not None]
    golden = any(pair.gold for pair in comparison.pairs)
    out = _table("task", "item", "", "old", "new", *(("gold",) if golden else ()), left=6)
    for place, what, item in sorted(turns[:most], key=lambda one: one[0]):
        name, pair = named[place]
        old, new = pair.old[item], pair.new[item]
        if pair.flips.both_right is None:
            what = f"{what} {new.score - old.score:+.3g}"
        answers = (old.output, new.output, *((pair.gold.get(item, NONE),) if golden else ()))
        _add(out, name, _shown(str(item)), what, *map(_shown, answers))
    return out


def how_to_read(comparison: Comparison) -> str:
    """A legend of `RATES`."""
    rows = [found for _, _, found in _rows(comparison)]
    tests = ["McNemar's exact test"] if any(found.both_right is not None for found in rows) else []
    tests += ["a paired bootstrap"] if any(found.both_right is None for found in rows) else []
    lower = "; above 0 is better also where lower values are" if _lower(comparison) else ""
    return (
        f"Shares in %. Difference [95% interval], p by {' or '.join(tests)}{lower}; NFR, PFR: items the new model "
        "lost and won; NFR_mc: lost, or wrong in another way; BTC: what is still right of what was; expected: the NFR "
        "if the two erred independently."
    )


def _lower(comparison: Comparison) -> bool:
    return any(pair.direction == "lower" for pair in comparison.pairs)


def _named(comparison: Comparison) -> list[tuple[str, Pair]]:
    """Each task under its name, with its split where both splits are there."""
    count = Counter(pair.task for pair in comparison.pairs)
    return [(f"{p.task} ({p.split})" if count[p.task] > 1 else p.task, p) for p in comparison.pairs]


def _rows(comparison: Comparison) -> list[tuple[str, str, Flips]]:
    """Name, metric and flips of each task and, of several, of all their items."""
    rows = [(name, pair.metric, pair.flips) for name, pair in _named(comparison)]
    pooled = comparison.pooled_pairs
    if len(pooled) > 1 and comparison.pooled is not None:
        rows.append(("pooled", pooled[0].metric, comparison.pooled))
    return rows


def unit_of(found: Flips, metric: str) -> str:
    """Right and wrong are counted in percent, whatever the metric's name."""
    return metric if found.both_right is None else "accuracy"


def difference_of(found: Flips, unit: str) -> str:
    low_high = "" if found.interval is None else f" [{', '.join(_signed(end, unit) for end in found.interval)}]"
    return _signed(found.difference, unit) + low_high


def _signed(value: float, unit: str) -> str:
    text = number(value, unit) if unit in SHARES else f"{value:.3g}"
    if text.strip("-0.") == "":  # what rounds to zero has no sign
        return text.lstrip("-")
    return text.replace("-", "−") if value < 0 else f"+{text}"


def p_of(p: float | None) -> str:
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _shown(text: str) -> str:
    """One line of an answer, cut."""
    line = " ".join(text.split())
    return line if len(line) <= ANSWER else line[: ANSWER - 1] + "…"


def _table(*heads: str, left: int = 1) -> Table:
    from rich import box
    from rich.table import Table

    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, head in enumerate(heads):
        out.add_column(literal(head), justify="left" if i < left else "right", overflow="fold")
    return out


def _add(table: Table, *cells: str, end: bool = False) -> None:

    table.add_row(*map(literal, cells), end_section=end)
