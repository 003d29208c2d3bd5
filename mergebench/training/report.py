"""What training shows: a table with standard errors over seeds, a plot of the curves, a card."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergebench.checkpoint import card as markdown
from mergebench.checkpoint.card import code, linked, listed
from mergebench.errors import human
from mergebench.evaluation.tables.layout import SHARES

Run = Mapping[str, Any]

HEADER = ("row", "validation", "test", "trained", "on disk", "lr", "ms a step", "saved", "peak")
ROWS = 24  # that the card names the models of


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over seeds and its standard error; None of one seed."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), spread


def by_row(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each row, in order."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run["row"], []).append(run)
    return found


def lines(runs: Sequence[Run]) -> list[list[str]]:
    """The cells of the table below `HEADER`, a line a row."""
    out = []
    for name, several in by_row(runs).items():
        seconds = statistics.fmean(1000 * run["seconds"] / max(run["steps"], 1) for run in several)
        out.append(
            [
                name,
                *(shown(several, part) for part in ("validation", "test")),
                f"{several[0]['parameters']:,}",
                human(several[0]["bytes"]),
                " ".join(dict.fromkeys(f"{run['lr']:g}" for run in several)),
                f"{seconds:,.0f}",
                human(several[0]["saved_by_autograd"]),
                human(max(run["peak_memory"] for run in several)),
            ]
        )
    return out


def legend(runs: Sequence[Run]) -> str:
    """What the table's columns are."""
    seeds = len({run["seed"] for run in runs})
    errors = f"mean of {seeds} seeds ± its standard error" if seeds > 1 else "one seed"
    metrics = ", ".join(dict.fromkeys(metric_of(run) for run in runs if metric_of(run)))
    named = f"{metrics[0].upper()}{metrics[1:]} in %" if metrics else "No metric"
    return (
        f"{named}: {errors}; trained: numbers that are trained, without the task's head; saved: what "
        "autograd keeps of the first batch; peak: of the whole process"
    )


def table(runs: Sequence[Run]) -> str:
    """The table as Markdown."""
    named = [[markdown.escape(first), *cells] for first, *cells in lines(runs)]
    rows = [HEADER, ["---", *["---:"] * (len(HEADER) - 1)], *named]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def metric_of(run: Run) -> str:
    return next((run[part]["metric"] for part in ("test", "validation") if part in run), "")


def unit_of(run: Run) -> tuple[str, float]:
    """A metric as plots name it, and what its values are multiplied by."""
    metric = metric_of(run)
    return (f"{metric}, %", 100.0) if metric in SHARES else (metric, 1.0)


def measured_on(runs: Sequence[Run]) -> str:
    """The part that rows are compared on: the test items, or else those of validation; empty where there are none."""
    return next((part for part in ("test", "validation") if all(part in run for run in runs)), "")


def shown(several: Sequence[Run], part: str) -> str:
    """The mean of a row's seeds and its standard error, in %."""
    if any(part not in run for run in several):
        return "–"
    mean, error = mean_and_error([100 * run[part]["value"] for run in several])
    return f"{mean:.1f}" + (f" ± {error:.1f}" if error is not None else "")


def finding(runs: Sequence[Run], apart: bool = False) -> str:
    """The best row and the next, in a sentence; empty where nothing was measured. apart: each has a task of its own."""
    part = measured_on(runs)
    if not part:
        return ""
    rows = by_row(runs)
    best, *others = sorted(rows, key=lambda name: -statistics.fmean(run[part]["value"] for run in rows[name]))
    seeds = len({run["seed"] for run in runs})
    over = f" ({f'mean of {seeds} seeds ± its standard error' if seeds > 1 else 'one seed'})."
    if others and apart:
        ends = f"{shown(rows[others[-1]], part)}% of {others[-1]} to {shown(rows[best], part)}% of {best}"
        return f"{len(rows)} rows, each on a task of its own: {part} {metric_of(runs[0])} from {ends}{over}"
    said = f"{best} has {f'the best {part}' if others else part} {metric_of(runs[0])}, {shown(rows[best], part)}%"
    if others:
        said += f"; the next of {len(rows)} rows, {others[0]}, has {shown(rows[others[0]], part)}%"
    return said + over


def card(out: Path, provenance: Mapping[str, Any]) -> str:
    """README.md of the directory."""
    runs = provenance["runs"]
    rows = [f"{markdown.escape(name)}: {_model(several, out)}" for name, several in by_row(runs).items()]
    parts = [
        markdown.escape(finding(runs, any("task" in row for row in provenance["config"].get("rows", {}).values()))),
        table(runs),
        legend(runs) + ".",
        *(f"![{figure}]({figure}.png)" for figure in ("scores", "curves") if figure == "curves" or measured_on(runs)),
        "Trained by `mergebench train`. A run is a model, named after its base and a plus:",
        listed(rows[:ROWS]) + (f"\n- and {len(rows) - ROWS} more" if len(rows) > ROWS else ""),
    ]
    models = [run["model"] for run in runs]
    return markdown.card(out.name, parts, tags=["mergebench", "peft"], relation="adapter", models=models)


def _model(several: Sequence[Run], out: Path) -> str:
    """The models of a row's runs, by the first."""
    first, *others = (code(f"{out.name}/{run['directory']}") for run in several)
    said = f"{linked(several[0]['model'], out)} + {first}"
    return f"{said} to {others[-1]}" if others else said
