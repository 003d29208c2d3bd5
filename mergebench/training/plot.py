"""The plots of a training: the score of each row with every seed, and its curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergebench.checkpoint import drawing
from mergebench.checkpoint.drawing import WIDTH, look
from mergebench.evaluation.page.figures import Figure, room
from mergebench.training.report import Run, by_row, mean_and_error, measured_on, shown, unit_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


def write(runs: Sequence[Run], folder: Path) -> None:
    """Every plot as NAME.png."""
    for figure in figures(runs):
        drawing.write(figure.draw(WIDTH), folder / f"{figure.name}.png")


def figures(runs: Sequence[Run]) -> list[Figure]:
    """Scores, where something was measured, and curves."""
    return [*([_scores(runs)] if measured_on(runs) else []), _curves(runs)]


def _scores(runs: Sequence[Run]) -> Figure:
    """The score of each row on test, or else on validation: a dot a seed, mean and standard error."""
    part, (unit, scale) = measured_on(runs), unit_of(runs[0])
    rows = {name: several for name, several in by_row(runs).items() if all(part in run for run in several)}
    values = {name: [scale * run[part]["value"] for run in several] for name, several in rows.items()}
    seeds = len({run["seed"] for run in runs})
    means = [shown(several, part) for several in rows.values()]
    trained = [f"{statistics.fmean(run['parameters'] for run in several):,.0f}" for several in rows.values()]

    def draw(width: float) -> Canvas:
        letters = [max(map(len, column)) for column in (means, ["trained", *trained])]
        ends = 12 + 6.4 * letters[0], 26 + 6.4 * sum(letters)  # units beside the axes where the columns end
        with drawing.plots(width, 80 + 24 * len(rows)) as (canvas, (axes,)):
            where = axes.get_yaxis_transform()
            for number, several in enumerate(values.values()):
                colour, mark, _ = look(number)
                mean, error = mean_and_error(several)
                axes.plot(several, [number] * len(several), mark, color=colour, alpha=0.45, markersize=4.5)
                axes.errorbar(mean, number, xerr=error, fmt="|", color=colour, markersize=13, elinewidth=2)
            for number, columns in enumerate([("mean", "trained"), *zip(means, trained, strict=True)], -1):
                for end, text in zip(ends, columns, strict=True):
                    axes.annotate(
                        text, (1, max(number, -0.95)), (end, 0), where, "offset points", ha="right", va="center",
                        fontsize=10, color=drawing.SOFT if number < 0 else drawing.INK, annotation_clip=False,
                    )  # fmt: skip
            axes.set_yticks(range(len(rows)), [drawing.short(name, room(width)) for name in rows])
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.set_xlabel(f"{unit}, {part}" + ": each seed, mean ± standard error" * (seeds > 1))
            axes.grid(axis="x")
            axes.spines[["left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        return canvas

    said = ", ".join(f"{name} {mean}" for name, mean in zip(rows, means, strict=True))
    caption = f"Dots: {seeds} seeds; line and number: their mean ± standard error." if seeds > 1 else "One seed."
    return Figure("scores", f"{unit} on {part}: {said}.", draw, wide=True, caption=caption)


def _curves(runs: Sequence[Run]) -> Figure:
    """The loss of the steps and, where there are validation items, loss and score on them; a line a run, a colour a
    row."""
    unit, scale = unit_of(runs[0])
    plots = [("loss", "loss, training", 1.0)]
    if any("validation" in point for run in runs for point in run["history"]):
        plots += [("validation_loss", "loss, validation", 1.0), ("validation", f"{unit}, validation", scale)]
    rows = by_row(runs)

    def draw(width: float) -> Canvas:
        with drawing.plots(width, 230, len(plots), drawing.legend_height(list(rows), width)) as (canvas, several_axes):
            for axes, (key, title, times) in zip(several_axes, plots, strict=True):
                for number, (name, several) in enumerate(rows.items()):
                    colour, mark, dashes = look(number)
                    for place, run in enumerate(several):
                        points = [(point["step"], times * point[key]) for point in run["history"] if key in point]
                        axes.plot(
                            [step for step, _ in points], [value for _, value in points],
                            color=colour, linestyle=dashes, marker=mark if key != "loss" else None, markersize=3,
                            linewidth=1.2 if key != "loss" else 0.9, alpha=1 if len(several) == 1 else 0.7,
                            label=drawing.short(name, 32) if not place else None,
                        )  # fmt: skip
                axes.set_xlabel("step")
                axes.set_title(title)
                axes.grid(axis="y")
            if len(rows) > 1:
                drawing.legend(canvas, width)
        return canvas

    alt = f"{', '.join(title for _, title, _ in plots)} by step, for {', '.join(rows)}."
    seeds = " A line a seed." if len({run["seed"] for run in runs}) > 1 else ""
    return Figure("curves", alt, draw, wide=True, caption=f"Curves of the training by step.{seeds}")
