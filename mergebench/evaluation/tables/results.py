"""Views of results: a table for the terminal, the same in Markdown for files and model cards, and the JSON document."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from mergebench.evaluation.compare.inference import end_of
from mergebench.evaluation.compare.rivals import documents
from mergebench.evaluation.results import FILE, Record, Results, mean_relatives, mean_values
from mergebench.evaluation.tables.flips import difference_sheets
from mergebench.evaluation.tables.layout import NONE, SHARES, number, short_names
from mergebench.evaluation.tables.sheet import Cell as Cell
from mergebench.evaluation.tables.sheet import Sheet, written

VIEW = "evaluation.md"


def document_of(results: Results) -> dict[str, Any]:
    """The whole document, ready for JSON; comparisons with the baseline stand in it for other programs."""
    records = [vars(record) for record in results.records]
    return {
        "made": dict(results.made),
        "records": records,
        "comparisons": documents(results),
        "items": {task: dict(items) for task, items in results.items.items()},
    }


def save(results: Results, directory: Path) -> None:
    """Write `evaluation.json` (`Results.load` reads it) and `evaluation.md`, each in one step; one record a line.

    `ValueError` for a number that JSON has no word for, `RunError` where a file cannot be written.
    """
    from mergebench.checkpoint.files import write_atomically  # torch comes with it

    parts = document_of(results)
    made = json.dumps(parts["made"], indent=1, ensure_ascii=False, allow_nan=False)
    records, comparisons = (
        ",\n".join(json.dumps(entry, ensure_ascii=False, allow_nan=False) for entry in parts[name])
        for name in ("records", "comparisons")
    )
    items = json.dumps(parts["items"], ensure_ascii=False)
    text = f'{{"made": {made},\n"records": [\n{records}\n],\n"comparisons": [\n{comparisons}\n],\n"items": {items}}}\n'
    write_atomically(directory / FILE, text)
    write_atomically(directory / VIEW, markdown(results))


@dataclass(frozen=True)
class Row:
    model: str
    role: str
    cells: list[Cell]  # one a task, mean, mean relative


def sheets(results: Results, *, bold: bool = True) -> list[Sheet]:
    """The table of every model on every task, then those of their differences."""
    rows = rows_of(results)
    heads = ["model", "", *heads_of(results)]
    ends = frozenset(i for i, (row, after) in enumerate(pairwise(rows)) if after.role != row.role)
    cells = [[Cell(row.model), Cell(row.role), *row.cells] for row in rows]
    errors: dict[int, tuple[str, ...]] = {1: ("role",)} | {
        place: (name, f"{name} ±") for place, name in enumerate(heads) if name in results.tasks and place > 1
    }
    errors |= {place: ("relative %",) for place, name in enumerate(heads) if name == "relative" and place > 1}
    return [Sheet(heads, cells, legend(results, bold=bold), 2, ends, errors), *difference_sheets(results)]


def report(results: Results, *, width: int | None = None, styled: bool = False) -> str:
    """Tables and legends as text, at most `width` columns wide (None: as wide as it needs).

    `styled`: with a terminal's codes for bold; plain text does not mark the best.
    """
    found = sheets(results, bold=styled)
    lines = [line for sheet in found for line in sheet.terminal(width=width, styled=styled)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def markdown(results: Results) -> str:
    """GitHub tables, each with a line that says how to read it."""
    return written(sheets(results), "markdown") + "\n"


def legend(results: Results, *, bold: bool = True) -> str:
    """How to read the table, in a sentence or two; `bold` where it can show what is best."""
    metrics = {record.task: (record.metric, record.direction) for record in results.records}
    said = {m: m[0] + (" in %" if m[0] in SHARES else f" ({m[1]} is better)") for m in metrics.values()}
    names = "; ".join(said.values() if len(said) < 2 else (f"{task}: {said[m]}" for task, m in metrics.items()))
    counts = sorted({record.n for record in results.records})
    items = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "no"
    splits = ", ".join(dict.fromkeys(record.split for record in results.records))
    text = f"{names}{',' if len(said) > 1 else ''} ± standard error, {items} {splits} items per task"
    if any(parts_of(record)[2] for record in results.records):
        text += "; ≥, ≤: the other end of the exact 95% interval, where every item is right, or wrong"
    if any(value is not None for value in mean_relatives(results).values()):
        text += "; relative: mean share of what each task's own fine-tune reaches"
    if results.made.get("by_task"):
        text += f"; {', '.join(results.made['by_task'])}: each task on the model made for it"
    for one in results.made.get("seen", ()):
        text += f"; {one}"
    for name, edits in results.made.get("unedited", {}).items():
        text += f"; {name}: before {', then '.join(edits)}"
    if bold and any(cell.best for row in rows_of(results) for cell in row.cells):
        text += "; bold: the best merge"
    return (text if len(said) > 1 else text[:1].upper() + text[1:]) + "."


def heads_of(results: Results) -> list[str]:
    return [*results.tasks, *(name for name, _ in _summaries(results))]


def _summaries(results: Results) -> list[tuple[str, dict[str, float | None]]]:
    """The means over the tasks, by model; without those that no model has, or that a column shows already."""
    found = [("mean", mean_values(results))] * (len(results.tasks) > 1) + [("relative", mean_relatives(results))]
    return [(name, by_model) for name, by_model in found if any(one is not None for one in by_model.values())]


def rows_of(results: Results) -> list[Row]:
    """One a model, in the order of the results; the best cells among merged models and baselines marked."""
    summaries = _summaries(results)
    metric = next((record.metric for record in results.records), "")
    names, rows, values = short_names(results.models), [], []
    for model in results.models:
        records = results.of(model)
        found = [records.get(task) for task in results.tasks]
        cells = [
            Cell(NONE) if record is None else Cell(value_of(record), parts=parts_of(record)[:2]) for record in found
        ]
        more = [(name, by_model[model]) for name, by_model in summaries]
        means = [_mean_cell(name, value, metric) for name, value in more]
        role = next(iter(records.values())).role
        rows.append(Row(names[model], role, [*cells, *means]))
        values.append([*(None if record is None else record.value for record in found), *(v for _, v in more)])
    _mark_best(results, rows, values)
    return rows


def _mean_cell(name: str, value: float | None, metric: str) -> Cell:
    if value is None:
        return Cell(NONE)
    return Cell(f"{value:.1%}", parts=(f"{100 * value:.1f}",)) if name == "relative" else Cell(number(value, metric))


def _mark_best(results: Results, rows: list[Row], values: list[list[float | None]]) -> None:
    """Where merges differ, the best ones: several where they are equal."""
    competing = [i for i, row in enumerate(rows) if row.role in ("merged", "baseline")]
    ways = {record.task: record.direction for record in results.records}
    common = next(iter(ways.values()), "higher")  # means are there only where all tasks agree
    for column in range(len(values[0]) if values else 0):
        way = ways[results.tasks[column]] if column < len(results.tasks) else common
        known = {value for i in competing if (value := values[i][column]) is not None}
        if len(known) < 2:
            continue
        best = max(known) if way == "higher" else min(known)
        for i in competing:
            if values[i][column] == best:
                rows[i].cells[column] = replace(rows[i].cells[column], best=True)


def value_of(record: Record) -> str:
    """A record as the table shows it: with a standard error, to that one's second digit. Where every item is right, or
    wrong, that would be 0: there the far end of an exact interval is shown."""
    value, error, end = parts_of(record)
    return value + (end or (f" ± {error}" if error else ""))


def share_of(right: float, n: int) -> str:
    """A share of n items in percent, as `value_of` shows an accuracy."""
    if right in (0, 1):
        return f"{100 * right:.1f} {'≥' if right else '≤'}{100 * end_of(right == 1, n):.1f}"
    return f"{100 * right:.1f} ± {100 * math.sqrt(right * (1 - right) / n):.1f}"


def parts_of(record: Record) -> tuple[str, str, str]:
    """Value, standard error and the far end of the interval, the last two empty where there is none."""
    value, error = record.value, record.stderr
    if error == 0 and value in (0, 1) and all(one.score == value for one in record.predictions.values()):
        end = number(end_of(value == 1, record.n), record.metric)
        return number(value, record.metric), "", f" {'≥' if value else '≤'}{end}"
    if error is None or record.metric in SHARES:
        return number(value, record.metric), "" if error is None else number(error, record.metric), ""
    places = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 3
    return f"{value:z.{places}f}", f"{error:.{places}f}", ""
