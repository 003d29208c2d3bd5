"""Views of results: a table for the terminal, the same in Markdown for files and model cards, and the JSON document."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench.checkpoint.card import escape
from mergebench.evaluation.compare.comparison import against
from mergebench.evaluation.results import FILE, Record, Results, mean_relatives, mean_values
from mergebench.evaluation.tables.flips import against_markdown, against_table
from mergebench.evaluation.tables.layout import NONE, SHARES, literal, markdown_line, number, render, short_names

if TYPE_CHECKING:
    from rich.table import Table

VIEW = "evaluation.md"


def document_of(results: Results) -> dict[str, Any]:
    """The whole document, ready for JSON; comparisons with the baseline stand in it for other programs."""
    records = [vars(record) for record in results.records]
    comparisons = [comparison.to_dict(items=False) for comparison in against(results)]
    return {"made": dict(results.made), "records": records, "comparisons": comparisons}


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
    text = f'{{"made": {made},\n"records": [\n{records}\n],\n"comparisons": [\n{comparisons}\n]}}\n'
    write_atomically(directory / FILE, text)
    write_atomically(directory / VIEW, markdown(results))


@dataclass(frozen=True)
class Cell:
    """A text, and whether it is the best of the merged models in its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Row:
    model: str
    role: str
    cells: list[Cell]  # one a task, mean, mean relative


def table(results: Results) -> Table:
    """For the terminal; four tasks and names of up to 20 letters fit 100 columns."""
    from rich import box
    from rich.table import Table

    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column("model", overflow="fold", min_width=8)
    out.add_column("", no_wrap=True)
    for name in heads_of(results):
        out.add_column(literal(name), justify="right", overflow="fold")
    rows = rows_of(results)
    for row, after in zip_longest(rows, rows[1:]):
        cells = [literal(cell.text, style="bold" if cell.best else "") for cell in row.cells]
        last = after is not None and after.role != row.role
        out.add_row(literal(row.model), row.role, *cells, end_section=last)
    return out


def report(results: Results, *, width: int | None = None, styled: bool = False) -> str:
    """Table and legend as text, at most `width` columns wide (None: as wide as it needs).

    `styled`: with a terminal's codes for bold; plain text does not mark the best.
    """
    lines = render(table(results), legend(results, bold=styled), width=width, styled=styled)
    second = against_table(results)
    if second is not None:
        lines += render(*second, width=width, styled=styled)
    return "\n".join(lines).strip("\n")


def markdown(results: Results) -> str:
    """A GitHub table and a line that says how to read it; then the same of the differences to the baseline."""
    heads = ["model", "", *heads_of(results)]
    lines = [markdown_line(map(escape, heads)), markdown_line(["---", "---", *["---:"] * (len(heads) - 2)])]
    for row in rows_of(results):
        cells = (f"**{cell.text}**" if cell.best else cell.text for cell in row.cells)
        lines.append(markdown_line([escape(row.model), row.role, *cells]))
    lines += ["", escape(legend(results))]
    second = against_markdown(results)
    return "\n".join([*lines, "", second] if second else lines) + "\n"


def legend(results: Results, *, bold: bool = True) -> str:
    """How to read the table, in a sentence or two; `bold` where it can show what is best."""
    metrics = {record.task: (record.metric, record.direction) for record in results.records}
    said = {m: m[0] + (" in %" if m[0] in SHARES else f" ({m[1]} is better)") for m in metrics.values()}
    names = "; ".join(said.values() if len(said) < 2 else (f"{task}: {said[m]}" for task, m in metrics.items()))
    counts = sorted({record.n for record in results.records})
    items = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "no"
    splits = ", ".join(dict.fromkeys(record.split for record in results.records))
    text = f"{names}{',' if len(said) > 1 else ''} ± standard error, {items} {splits} items per task"
    if any(value is not None for value in mean_relatives(results).values()):
        text += "; relative: mean share of what each task's own fine-tune reaches"
    if results.made.get("by_task"):
        text += f"; {', '.join(results.made['by_task'])}: each task on the model made for it"
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
        texts = [NONE if record is None else value_of(record) for record in found]
        more = [(name, by_model[model]) for name, by_model in summaries]
        texts += [NONE if v is None else f"{v:.1%}" if name == "relative" else number(v, metric) for name, v in more]
        role = next(iter(records.values())).role
        rows.append(Row(names[model], role, [Cell(text) for text in texts]))
        values.append([*(None if record is None else record.value for record in found), *(v for _, v in more)])
    _mark_best(results, rows, values)
    return rows


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
                rows[i].cells[column] = Cell(rows[i].cells[column].text, best=True)


def value_of(record: Record) -> str:
    """A record as the table shows it: with a standard error, to that one's second digit."""
    if record.stderr is None or record.metric in SHARES:
        error = "" if record.stderr is None else f" ± {number(record.stderr, record.metric)}"
        return f"{number(record.value, record.metric)}{error}"
    places = max(0, 1 - math.floor(math.log10(record.stderr))) if record.stderr > 0 else 3
    return f"{record.value:.{places}f} ± {record.stderr:.{places}f}"
