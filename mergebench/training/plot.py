"""The plots of a training: its curves, and the score of each row with every seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from mergebench.checkpoint import drawing
from mergebench.checkpoint.drawing import WIDTH, look
from mergebench.training.report import Run, by_row, mean_and_error, unit_of


def curves(runs: Sequence[Run], file: Path) -> None:
    """A PNG: the loss of the steps and, where there are validation items, the score on them; a line a run, a colour a
    row."""
    unit, scale = unit_of(runs[0])
    plots = [("loss", "loss, training", 1.0)]
    if any("validation" in point for run in runs for point in run["history"]):
        plots += [("validation_loss", "loss, validation", 1.0), ("validation", f"{unit}, validation", scale)]
    rows = by_row(runs)
    width = 330.0 * len(plots)
    height = 270 + drawing.legend_height(list(rows), width)
    with drawing.plots(width, height, len(plots)) as (canvas, several_axes):
        for axes, (key, title, times) in zip(several_axes, plots, strict=True):
            for number, (name, several) in enumerate(rows.items()):
                for place, run in enumerate(several):
                    points = [(point["step"], times * point[key]) for point in run["history"] if key in point]
                    axes.plot(
                        [step for step, _ in points],
                        [value for _, value in points],
                        color=look(number).colour,
                        linestyle=look(number).dashes,
                        marker=look(number).mark if key != "loss" else None,
                        markersize=3,
                        linewidth=1.2,
                        alpha=1 if len(several) == 1 else 0.7,
                        label=name if not place else None,
                    )
            axes.set_xlabel("step")
            axes.set_ylabel(title)
            axes.grid(axis="y")
        if len(rows) > 1:
            drawing.legend(canvas, width)
        drawing.write(canvas, file)


def scores(runs: Sequence[Run], file: Path) -> None:
    """A PNG: the score of each row on test, or else on validation: a dot a seed, mean and standard error."""
    part = "test" if all("test" in run for run in runs) else "validation"
    rows = {name: several for name, several in by_row(runs).items() if all(part in run for run in several)}
    if not rows:  # nothing was measured
        return
    unit, scale = unit_of(runs[0])
    with drawing.plots(WIDTH + 40, 80 + 26 * len(rows)) as (canvas, (axes,)):
        for number, several in enumerate(rows.values()):
            values = [scale * run[part]["value"] for run in several]
            mean, error = mean_and_error(values)
            colour = look(number).colour
            axes.plot(values, [number] * len(values), "o", color=colour, alpha=0.4, markersize=4)
            axes.errorbar(mean, number, xerr=error, fmt="|", color=colour, markersize=12, elinewidth=1.6, capsize=0)
            trained = statistics.fmean(run["parameters"] for run in several)
            where = axes.get_yaxis_transform()
            axes.text(1.02, number, f"{trained:,.0f}", transform=where, va="center", fontsize=9)
        axes.text(1.02, -0.9, "trained", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [drawing.short(name, 32) for name in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(f"{unit}, {part}: each seed, mean and standard error")
        axes.grid(axis="x")
        axes.spines[["left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        drawing.write(canvas, file)
