"""The plots of a training: its curves, and the score of each row with every seed."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergebench.training.report import Run, by_row, mean_and_error, metric_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours ("Color universal design", 2008)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c8200")
LONGEST = 28  # letters of a row's name, which are letters, digits, - and _


def curves(runs: Sequence[Run], file: Path) -> None:
    """A PNG: the loss of the steps and, where there are validation items, the score on them; a line a run, a colour a
    row."""
    plots = [("loss", "loss, training")]
    if any("validation" in point for run in runs for point in run["history"]):
        plots += [("validation_loss", "loss, validation"), ("validation", f"{metric_of(runs[0])}, validation")]
    canvas = _figure(4.6 * len(plots), 4)
    for axes, (key, title) in zip(canvas.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
        for number, (name, several) in enumerate(by_row(runs).items()):
            for place, run in enumerate(several):
                points = [(point["step"], point[key]) for point in run["history"] if key in point]
                axes.plot(
                    [step for step, _ in points],
                    [value for _, value in points],
                    color=COLOURS[number % len(COLOURS)],
                    linestyle=("-", "--", ":")[number // len(COLOURS) % 3],
                    marker="o" if key != "loss" else None,
                    markersize=3,
                    linewidth=1.2,
                    alpha=1 if len(several) == 1 else 0.7,
                    label=name if not place else None,
                )
        axes.set_xlabel("step")
        axes.set_ylabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    if len(by_row(runs)) > 1:
        canvas.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    canvas.savefig(file, dpi=120)


def scores(runs: Sequence[Run], file: Path) -> None:
    """A PNG: the score of each row on test, or else on validation: a dot a seed, mean and standard error."""
    part = "test" if all("test" in run for run in runs) else "validation"
    rows = {name: several for name, several in by_row(runs).items() if all(part in run for run in several)}
    if not rows:  # nothing was measured
        return
    figure = _figure(6.4, 1.4 + 0.34 * len(rows))
    axes = figure.subplots()
    for number, several in enumerate(rows.values()):
        values = [run[part]["value"] for run in several]
        mean, error = mean_and_error(values)
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(values, [number] * len(values), "o", color=colour, alpha=0.4, markersize=4)
        axes.errorbar(mean, number, xerr=error, fmt="|", color=colour, markersize=12, elinewidth=1.6, capsize=0)
        trained = statistics.fmean(run["parameters"] for run in several)
        where = axes.get_yaxis_transform()
        axes.text(1.02, number, f"{trained:,.0f}", transform=where, va="center", fontsize=8, color="#555555")
    axes.text(1.02, -0.9, "trained", transform=axes.get_yaxis_transform(), va="center", fontsize=8, color="#555555")
    axes.set_yticks(range(len(rows)), [name if len(name) <= LONGEST else f"{name[:LONGEST]}…" for name in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"{metric_of(runs[0])}, {part}: each seed, mean and standard error")
    axes.grid(axis="x", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(file, dpi=120)


def _figure(width: float, height: float) -> Figure:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # hide its messages about the font cache
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
