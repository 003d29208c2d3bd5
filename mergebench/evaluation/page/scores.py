"""What was measured: the table, each task's bars, all models on every task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from mergebench.checkpoint import drawing
from mergebench.checkpoint.drawing import LINE, Look
from mergebench.errors import MergebenchError
from mergebench.evaluation.compare.comparison import compare
from mergebench.evaluation.page import curves, figures
from mergebench.evaluation.page.figures import Figure
from mergebench.evaluation.page.parts import Gallery, Section, Table, cells
from mergebench.evaluation.page.sources import Sources
from mergebench.evaluation.results import Record, Results, mean_relatives, mean_values
from mergebench.evaluation.tables.flips import difference_of, difference_sheets, p_said, unit_of
from mergebench.evaluation.tables.layout import SHARES, number, short_names
from mergebench.evaluation.tables.results import Cell, heads_of, legend, rows_of, value_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

SIZES = "Scores against what each model takes on disk, an adapter without its base. Whiskers are the standard error."


def sections(sources: Sources) -> Iterator[Section]:
    """The table, what could not be measured, then what the table looks like."""
    results = sources.results
    if results is None:
        return
    failed = results.made.get("failed") or []
    if failed:
        said = [(one["model"], ", ".join(one["tasks"]), one["error"], one["hint"] or "") for one in failed]
        heads = ["model", "tasks", "error", "way out"]
        yield Section("Not measured", [Table(heads, [cells(*one) for one in said], "What failed.", words=4)])
    if not results.records:
        return
    rows = [[Cell(row.model), Cell(row.role), *row.cells] for row in rows_of(results)]
    note = legend(results, bold=False)
    if any(cell.best for row in rows for cell in row):
        note = f"{note[:-1]}; bold with a star: the best merge."
    table = Table(["model", "role", *heads_of(results)], rows, note, words=2)
    differences = [Table(one.heads, one.rows, one.legend, words=one.left) for one in difference_sheets(results)]
    if sources.runs:  # whose table stands there already, with the models as columns
        yield Section("Differences", differences)
    else:
        yield Section("Results", [table, *differences])
    sizes = curves.by_size(results, sources.looks)
    if sizes:
        yield Section("Size", [Gallery(sizes, SIZES)])
    drawn = [_bars(results, task, sources.looks) for task in results.tasks]
    ways = {record.direction for record in results.records}
    note = "Bars begin at zero; whiskers are the standard error" + ("." if ways == {"higher"} else "; ")
    if "lower" in ways:
        note += "lower is better where the title says so."
    note += " Dashed: the base." * any(record.role == "base" for record in results.records)
    if any(record.role == "input" and record.relative == 1.0 for record in results.records):
        note += " Solid: the task's own fine-tune (hatched)."
    yield Section("Task by task", [Gallery(drawn, note)])
    if len(results.tasks) > 1 and len(results.models) > 1:
        yield Section("Across tasks", [_across(results, sources.looks)])


def finding(results: Results) -> list[str]:
    """The table in a sentence."""
    if not results.records:
        return []
    relative, means = mean_relatives(results), mean_values(results)
    is_relative = any(relative.get(model) is not None for model in results.models)
    values = relative if is_relative else means
    roles = {record.model: record.role for record in results.records}
    ways = {record.direction for record in results.records}
    names = short_names(results.models)
    metric = results.records[0].metric

    def said(model: str) -> str:
        value = values[model] or 0.0
        return f"{value:.1%}" if is_relative else f"{number(value, metric)}{'%' * (metric in SHARES)}"

    def best(among: list[str]) -> str:
        return (max if ways == {"higher"} else min)(among, key=lambda model: values[model] or 0.0)

    known = [model for model in results.models if values.get(model) is not None]
    merges = [model for model in known if roles[model] == "merged"]
    rivals = [model for model in known if roles[model] == "baseline"]
    bases = [model for model in known if roles[model] == "base"]
    what = "of what each task's own fine-tune reaches" if is_relative else f"{metric} in the mean"
    if not known:
        return ["Tasks of different metrics have no mean: see the table."]
    if not merges:
        top = best(known)
        return [f"The best mean is that of {names[top]}: {said(top)}{'' if is_relative else f' {metric}'}."]
    top = best(merges)
    beside = f"; the base has {said(bases[0])}" if bases else ""
    if not rivals:
        return [f"{names[top]} has {said(top)} {what}{beside}."]
    rival = best(rivals)
    verdict = _verdict(results, rival, top)
    against = f"the best baseline, {names[rival]}, has {said(rival)}{verdict}"
    return [f"{names[top]} has {said(top)} {what}; {against}{beside}."]


def _verdict(results: Results, old: str, new: str) -> str:
    """Whether their difference may be chance, over the items that both answered; empty where they have no such test."""
    with suppress(MergebenchError):  # not the same items
        found = compare(old, new, results)
        if found.pooled is not None and found.pooled.p is not None:
            p = p_said(found.pooled.p)
            if found.pooled.p >= 0.05:
                return f": no significant difference ({p})"
            unit = unit_of(found.pooled, found.pooled_pairs[0].metric)
            return f": a significant difference, {difference_of(found.pooled, unit)} over the items ({p})"
    return ""


def _bars(results: Results, task: str, looks: Mapping[str, Look]) -> Figure:
    """Base, the task's own fine-tune and every merge; all models where nothing was merged."""
    records = [record for record in results.records if record.task == task]
    names = short_names(results.models)
    own = [record for record in records if record.role == "input" and record.relative == 1.0]
    shown = [record for record in records if record.role in ("base", "baseline", "merged") or record in own]
    if not any(record.role in ("baseline", "merged") for record in records):
        shown = records
    shown.sort(key=lambda record: ("base", "input", "baseline", "merged").index(record.role))
    rows = [(names[r.model], r.value, r.stderr, looks[names[r.model]].colour, value_of(r)) for r in shown]
    marks = [(r.value, "--" if r.role == "base" else "-") for r in shown if r.role == "base" or r in own]
    first = records[0]
    title = f"{task}: {first.metric}" + (" (lower is better)" if first.direction == "lower" else "")
    alt = f"{title}. " + ", ".join(f"{names[r.model]} {value_of(r)}" for r in shown)
    hatched = [place for place, record in enumerate(shown) if record in own]
    most = 1.0 if first.metric in SHARES else None
    return figures.bars(figures.slug("task", task), alt, title, rows, hatched=hatched, marks=marks, most=most)


def _across(results: Results, looks: Mapping[str, Look]) -> Gallery:
    """A row of dots for each task, one a model; where metrics differ, each task from its worst model to its best."""
    tasks, names = results.tasks, short_names(results.models)
    metrics = {(record.metric, record.direction) for record in results.records}
    metric, direction = next(iter(metrics))
    one = len(metrics) == 1
    found = {task: [record.value for record in results.records if record.task == task] for task in tasks}

    def place(record: Record) -> tuple[float, float]:
        """Value and standard error on the axis."""
        low, high = min(found[record.task]), max(found[record.task])
        unit = (100.0 if metric in SHARES else 1.0) if one else 1 / (high - low) if high > low else 0.0
        value = record.value if one or record.direction == "higher" else high + low - record.value
        return (value if one else value - low) * unit if unit else 0.5, (record.stderr or 0.0) * unit

    ends = [value - error for record in results.records for value, error in [place(record)]]
    least = 10 * max(int(min(ends) // 10), 0) if one and metric in SHARES else 0
    shown = [drawing.short(names[model], 40) for model in results.models]
    apart = max(5.0, min(9.0, 500 / (len(tasks) * len(shown))))  # between two dots

    def draw(width: float) -> Canvas:
        height = 60 + len(tasks) * (len(shown) + 1) * apart + drawing.legend_height(shown, width)
        with figures.plot(width, height) as (canvas, axes):
            for row, model in enumerate(results.models):
                look, records = looks[names[model]], results.of(model)
                known = [(y, *place(records[task])) for y, task in enumerate(tasks) if task in records]
                axes.errorbar(
                    [value for _, value, _ in known],
                    [y + (row - (len(shown) - 1) / 2) / (len(shown) + 1) for y, *_ in known],
                    xerr=[error for *_, error in known], label=shown[row], color=look.colour, marker=look.mark,
                    markersize=5, linestyle="none", elinewidth=1,
                )  # fmt: skip
            for y in range(1, len(tasks)):
                axes.axhline(y - 0.5, color=LINE, linewidth=0.8)
            axes.set_yticks(range(len(tasks)), [drawing.short(task, figures.room(width)) for task in tasks])
            axes.set_ylim(len(tasks) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.grid(True, axis="x")
            if one and metric in SHARES:
                axes.set_xlim(least, 101)
            if one:
                lower = " (lower is better)" if direction == "lower" else ""
                axes.set_xlabel(f"{metric}{', %' if metric in SHARES else ''}{lower}")
            else:
                axes.set_xticks([0, 1], ["worst", "best"])
            drawing.legend(canvas, width)
        return canvas

    alt = f"Dots of {len(shown)} models for each of {len(tasks)} tasks; the numbers are in the table above."
    scale = "Whiskers are the standard error" if one else "Each task from its worst model to its best"
    begin = f" The axis begins at {least}." if least else ""
    return Gallery([Figure("across-tasks", alt, draw, wide=True)], f"All models on each task. {scale}.{begin}")
