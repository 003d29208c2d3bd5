"""Flips: the items that a model answers worse, or better, than the baseline; MUSCLE's rates (arXiv:2407.09435)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mergebench.checkpoint import drawing
from mergebench.checkpoint.drawing import INK, PAPER
from mergebench.evaluation.compare.comparison import Comparison, Pair, against
from mergebench.evaluation.page import figures
from mergebench.evaluation.page.figures import Figure
from mergebench.evaluation.page.parts import Fold, Gallery, Section, Table, cells
from mergebench.evaluation.page.sources import Sources
from mergebench.evaluation.results import Results
from mergebench.evaluation.tables.flips import RATES, difference_of, how_to_read, p_said, rate_rows, unit_of
from mergebench.evaluation.tables.layout import number, short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

MODELS, ITEMS, ANSWER = 6, 200, 120  # models drawn, items listed of each, letters of an answer


def sections(sources: Sources) -> Iterator[Section]:
    """Merged models and what they are compared with; all models where nothing was merged."""
    results = sources.results
    comparisons = [] if results is None else against(results)
    if results is None or not comparisons:
        return
    roles = {record.model: record.role for record in results.records}
    merges = [one for one in comparisons if roles[one.new] in ("merged", "baseline")]
    shown = sorted(merges or comparisons, key=lambda one: roles[one.new] != "merged")[:MODELS]
    names = short_names(results.models)
    old = names[shown[0].old]
    most = max([1, *(len(side) for one in shown for p in one.pairs for side in (p.flips.lost, p.flips.won))])
    looks = sources.looks
    drawn = [_bars(one, names[one.new], old, looks[names[one.new]].colour, most) for one in shown]
    rows = [cells(names[one.new], *row) for one in shown for row in rate_rows(one)]
    table = Table(["model", *RATES], rows, how_to_read(shown[0]), words=2, grouped=True)
    lists = [_list(one, names[one.new]) for one in shown]
    caption = f"Items lost (left, hatched) and won (right, plain) against {old}, by task."
    yield Section(f"Flips against {old}", [Gallery(drawn, caption), table, *lists])


def finding(results: Results) -> list[str]:
    """The best merge against the baseline, over all items, in a sentence; none where that has no single number."""
    roles = {record.model: record.role for record in results.records}
    merged = [one for one in against(results) if roles[one.new] == "merged" and one.pooled is not None]
    found = []
    for one in merged[:1]:
        assert one.pooled is not None
        flips, names = one.pooled, short_names(results.models)
        unit = unit_of(flips, one.pooled_pairs[0].metric)
        what = " percentage points" if flips.share else " in the mean of the items"
        size = f"{difference_of(flips, unit)}{what}, {p_said(flips.p)}"
        count = f"{len(flips.lost):,} items lost, {len(flips.won):,} won"
        found.append(f"{names[one.new]} against {names[one.old]} over {flips.n:,} items: {size}; {count}.")
    return found


def _bars(comparison: Comparison, name: str, old: str, colour: str, most: int) -> Figure:
    """Counts to the left and to the right of a line, one row a task; `most`: the longest bar of all models."""
    pairs = comparison.pairs
    counts = [(pair.task, len(pair.flips.lost), len(pair.flips.won)) for pair in pairs]

    def draw(width: float) -> Canvas:
        with figures.plot(width, 44 + 22 * len(pairs)) as (canvas, axes):
            for row, (_, lost, won) in enumerate(counts):
                axes.barh(row, -lost, color=colour, height=0.68, hatch="////", edgecolor=PAPER, linewidth=0)
                axes.barh(row, won, color=colour, height=0.68)
                axes.text(-lost - most * 0.03, row, str(lost), ha="right", va="center", fontsize=10)
                axes.text(won + most * 0.03, row, str(won), ha="left", va="center", fontsize=10)
            axes.axvline(0, color=INK, linewidth=1)
            axes.set_yticks(range(len(pairs)), [drawing.short(task, figures.room(width)) for task, _, _ in counts])
            axes.set_ylim(len(pairs) - 0.4, -0.6)
            axes.set_xlim(-most * 1.2, most * 1.2)
            axes.set_xticks([])
            axes.spines[["bottom", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
            axes.set_title(drawing.short(f"{name}: lost | won", int(width / 9)))
        return canvas

    said = ", ".join(f"{task} {lost} lost and {won} won" for task, lost, won in counts)
    return Figure(figures.slug("flips", name), f"{name} against {old}: {said}.", draw, like=True)


def _list(comparison: Comparison, name: str) -> Fold:
    """The items themselves, what was lost first."""
    rows = []
    for pair in comparison.pairs:
        for what, items in (("lost", pair.flips.lost), ("won", pair.flips.won)):
            for item in items:
                before, after = pair.old[item], pair.new[item]
                score = "" if pair.flips.both_right is not None else _score(pair, item)
                text = _cut(pair.texts.get(item) or "")
                rows.append([pair.task, what, str(item), text, _cut(before.output), _cut(after.output), score])
    rows.sort(key=lambda row: row[1])
    heads = ["task", "", "item", "text", "before", "after", "score"]
    kept = [place for place, head in enumerate(heads) if head not in ("text", "score") or any(r[place] for r in rows)]
    listed = [cells(*(row[place] for place in kept)) for row in rows[:ITEMS]]
    count = f"{len(rows)} items flipped" if len(rows) != 1 else "1 item flipped"
    more = f"The first {ITEMS}, those lost first; all are in evaluation.json." if len(rows) > ITEMS else ""
    words = sum(heads[place] != "score" for place in kept)
    table = Table([heads[place] for place in kept], listed, more or "Every item that flipped, those lost first.", words)
    return Fold(f"{name}: {count}", [table])


def _score(pair: Pair, item: str) -> str:
    return f"{number(pair.old[item].score, '')} → {number(pair.new[item].score, '')}"


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= ANSWER else f"{text[: ANSWER - 1]}…"
