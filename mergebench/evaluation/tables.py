"""Views of results: a table for the terminal, and the same table in Markdown for files and model cards."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from mergebench.evaluation.results import Record, Results, mean_relatives, mean_values

if TYPE_CHECKING:
    from rich.table import Table

NONE = "–"
WIDEST, MEASURE = 10_000, 72  # columns: more than any table has; what a line of text takes at least


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
    from rich.text import Text

    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column("model", overflow="fold", min_width=8)
    out.add_column("", no_wrap=True)
    for name in heads_of(results):
        out.add_column(Text(name), justify="right", overflow="fold")
    rows = rows_of(results)
    for row, after in zip_longest(rows, rows[1:]):
        cells = [Text(cell.text, style="bold" if cell.best else "") for cell in row.cells]
        last = after is not None and after.role != row.role
        out.add_row(Text(row.model), row.role, *cells, end_section=last)
    return out


def report(results: Results, *, width: int | None = None, styled: bool = False) -> str:
    """Table and legend as text, at most `width` columns wide (None: as wide as it needs).

    `styled`: with a terminal's codes for bold; plain text does not mark the best.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(
        width=width or WIDEST, force_terminal=styled, color_system="standard" if styled else None, legacy_windows=False
    )
    with console.capture() as capture:
        console.print(table(results))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    across = min(width or WIDEST, max(MEASURE, *(Text.from_ansi(line).cell_len for line in lines)))
    lines += textwrap.wrap(legend(results, bold=styled), across - 1, initial_indent=" ", subsequent_indent=" ")
    return "\n".join(lines).strip("\n")


def markdown(results: Results) -> str:
    """A GitHub table and a line that says how to read it."""
    heads = ["model", "", *heads_of(results)]
    lines = [_line(map(_escape, heads)), _line(["---", "---", *["---:"] * (len(heads) - 2)])]
    for row in rows_of(results):
        cells = (f"**{cell.text}**" if cell.best else cell.text for cell in row.cells)
        lines.append(_line([_escape(row.model), row.role, *cells]))
    return "\n".join([*lines, "", _escape(legend(results))]) + "\n"


def legend(results: Results, *, bold: bool = True) -> str:
    """How to read the table, in a sentence or two; `bold` where it can show what is best."""
    metrics = dict.fromkeys((record.metric, record.direction) for record in results.records)
    names = ", ".join(metric + (" in %" if metric in SHARES else f" ({way} is better)") for metric, way in metrics)
    counts = sorted({record.n for record in results.records})
    items = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "no"
    splits = ", ".join(dict.fromkeys(record.split for record in results.records))
    text = f"{names} ± standard error, {items} {splits} items a task"
    if any(value is not None for value in mean_relatives(results).values()):
        text += "; relative: mean share of what each task's own fine-tune reaches"
    if results.made.get("by_task"):
        text += f"; {', '.join(results.made['by_task'])}: each task on the model made for it"
    if bold and any(cell.best for row in rows_of(results) for cell in row.cells):
        text += "; bold: the best merge"
    return text[:1].upper() + text[1:] + "."


SHARES = ("accuracy",)  # metrics from 0 to 1, shown in percent


def short_names(names: Iterable[str]) -> dict[str, str]:
    """The last parts of each name that tell it from the others.

    `runs/a/tweets` and `base+b/nouns` become `tweets` and `nouns`; what is in brackets is left whole.
    """
    names = list(dict.fromkeys(names))
    split = {name: re.split(r"[/+](?![^(]*\))", name) for name in names}
    parts = {name: [part for part in split[name] if part not in ("", ".")] or [name] for name in names}
    longest = max(map(len, parts.values()), default=1)
    short = {name: name for name in names}
    left = set(names)
    for length in range(1, longest + 1):
        tails = {name: "/".join(parts[name][-length:]) for name in names}
        for name in list(left):
            if list(tails.values()).count(tails[name]) == 1:
                short[name] = tails[name]
                left.discard(name)
    return short


def heads_of(results: Results) -> list[str]:
    return [*results.tasks, "mean", "relative"]


def rows_of(results: Results) -> list[Row]:
    """One a model, in the order of the results; the best cells among merged models and baselines marked."""
    means, relatives = mean_values(results), mean_relatives(results)
    metric = next((record.metric for record in results.records), "")
    names, rows, values = short_names(results.models), [], []
    for model in results.models:
        records = results.of(model)
        found = [records.get(task) for task in results.tasks]
        mean, relative = means[model], relatives[model]
        texts = [NONE if record is None else _value(record) for record in found]
        texts += [NONE if mean is None else number(mean, metric), NONE if relative is None else f"{relative:.1%}"]
        role = next(iter(records.values())).role
        rows.append(Row(names[model], role, [Cell(text) for text in texts]))
        values.append([*(None if record is None else record.value for record in found), mean, relative])
    _mark_best(results, rows, values)
    return rows


def _mark_best(results: Results, rows: list[Row], values: list[list[float | None]]) -> None:
    """Where merges differ, the best ones: several where they are equal."""
    competing = [i for i, row in enumerate(rows) if row.role in ("merged", "baseline")]
    ways = {record.task: record.direction for record in results.records}
    common = next(iter(ways.values()), "higher")  # means are there only where all tasks agree
    for column, way in enumerate([*(ways[task] for task in results.tasks), common, common]):
        known = {value for i in competing if (value := values[i][column]) is not None}
        if len(known) < 2:
            continue
        best = max(known) if way == "higher" else min(known)
        for i in competing:
            if values[i][column] == best:
                rows[i].cells[column] = Cell(rows[i].cells[column].text, best=True)


def _value(record: Record) -> str:
    value = number(record.value, record.metric)
    return value if record.stderr is None else f"{value} ± {number(record.stderr, record.metric)}"


def number(value: float, metric: str) -> str:
    return f"{100 * value:.1f}" if metric in SHARES else f"{value:.4g}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Markdown's own signs taken literally, on one line."""
    return re.sub(r"([\\|*_`<\[\]])", r"\\\1", " ".join(text.split()))
