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

HEADER = ("", "validation", "test", "trained", "on disk", "lr", "ms a step", "saved", "peak")


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
                *(_cell(several, part) for part in ("validation", "test")),
                f"{several[0]['parameters']:,}",
                human(several[0]["bytes"]),
                " ".join(dict.fromkeys(f"{run['lr']:g}" for run in several)),
                f"{seconds:.0f}",
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
    return (
        f"{metrics or 'no metric'}: {errors}; trained: numbers that are trained, without the task's head; saved: what "
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


def _cell(several: Sequence[Run], part: str) -> str:
    if any(part not in run for run in several):
        return "–"
    mean, error = mean_and_error([100 * run[part]["value"] for run in several])
    return f"{mean:.1f}" + (f" ± {error:.1f}" if error is not None else "")


def card(out: Path, provenance: Mapping[str, Any]) -> str:
    """README.md of the directory."""
    runs = provenance["runs"]
    how = listed(
        f"{linked(run['model'], out)} with {code(out.name + '/' + run['directory'])}: {run['kind']}"
        for run in runs[:12]
    )
    parts = [
        "Trained by `mergebench train`. Each directory is one run: name it after its model and a plus.",
        how,
        table(runs),
        legend(runs) + ".",
        "![scores](scores.png)" if any("test" in run or "validation" in run for run in runs) else "",
        "![curves](curves.png)",
    ]
    models = [run["model"] for run in runs]
    return markdown.card(out.name, parts, tags=["mergebench", "peft"], relation="adapter", models=models)
