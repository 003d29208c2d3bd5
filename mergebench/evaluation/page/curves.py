"""Scores as curves: against what a model takes on disk, and against one parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mergebench.checkpoint import drawing
from mergebench.checkpoint.drawing import GREY, INK, Look, look
from mergebench.errors import human
from mergebench.evaluation.page import figures
from mergebench.evaluation.page.figures import Figure
from mergebench.evaluation.results import Record, Results, mean_values
from mergebench.evaluation.tables.layout import SHARES, number, short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

APART = 1.01  # sizes closer than this are one: the same tensors in other files


class Score(NamedTuple):
    """A value and its standard error in the unit that plots show."""

    value: float
    error: float | None


class Line(NamedTuple):
    """Scores at places across, from left to right."""

    name: str
    look: Look
    points: Sequence[tuple[float, Score]]


def by_size(results: Results, looks: Mapping[str, Look]) -> list[Figure]:
    """The models' scores against their bytes; the mean of the tasks where these share a metric, else each task."""
    sizes = {model: size for model, size in results.made.get("bytes", {}).items() if model in results.models}
    if len(sizes) < 2 or max(sizes.values()) <= APART * min(sizes.values()):
        return []
    names = short_names(results.models)
    found = []
    for what, label, scores in _scores(results):
        dots = [Line(names[m], looks[names[m]], [(sizes[m], scores[m])]) for m in sizes if m in scores]
        listed = ", ".join(f"{dot.name} {human(size)}: {_said(score)}" for dot in dots for size, score in dot.points)
        alt = f"{label} against size on disk. {listed}."
        found.append(drawn(figures.slug("size", what), alt, "size on disk", label, dots, sizes=True))
    return _beside(found)


def by_parameter(results: Results, name: str, values: Mapping[str, float]) -> list[Figure]:
    """Scores against the value of a parameter, by model: every task and their mean, in one plot where they share a
    metric. The base is a line across."""
    at = sorted(values, key=lambda model: values[model])
    base = next((record.model for record in results.records if record.role == "base"), None)
    curves = []
    for what, label, scores in _scores(results, each=True):
        bold = Look(INK, "o", "-") if what == "mean" else look(results.tasks.index(what))
        points = [(values[model], scores[model]) for model in at]
        curves.append((what, label, Line(what, bold, points), scores.get(base or "")))
    alike = len({record.metric for record in results.records}) == 1
    groups = [curves] if alike else [[one] for one in curves]
    found = []
    for group in groups:
        what, label, line, reached = group[-1]
        listed = ", ".join(f"{x:.4g}: {_said(score)}" for x, score in line.points)
        alt = f"{label} against {name}. {listed}."
        slug = figures.slug("curve", name, *([] if alike else [what]))
        lines = [one for _, _, one, _ in group]
        title = label.removeprefix("mean ") if alike else label
        found.append(drawn(slug, alt, name, title, lines, across=reached))
    return _beside(found)


def drawn(
    name: str,
    alt: str,
    xlabel: str,
    title: str,
    lines: Sequence[Line],
    *,
    across: Score | None = None,
    sizes: bool = False,
) -> Figure:
    """Lines with whiskers of the standard error. across: what the base has of the last one; sizes: the axis is one of
    bytes."""

    def draw(width: float) -> Canvas:
        names = [drawing.short(line.name, 40) for line in lines]
        base = "base" if len(lines) == 1 else f"base, {lines[-1].name}"  # whose score it is
        shown = [*names, base] if across is not None else names
        with figures.plot(width, 230 + drawing.legend_height(shown, width)) as (canvas, axes):
            axes.grid(True)
            for label, line in zip(names, lines, strict=True):
                colour, mark, dashes = line.look
                axes.errorbar(
                    [x for x, _ in line.points], [score.value for _, score in line.points],
                    yerr=[score.error or 0.0 for _, score in line.points], label=label, color=colour, marker=mark,
                    linestyle=dashes if len(line.points) > 1 else "none", markersize=5, elinewidth=1, capsize=2,
                    linewidth=2.0 if colour == INK else 1.2,
                )  # fmt: skip
            if across is not None:
                axes.axhline(across.value, color=GREY, linestyle=":", label=base)
            if sizes:
                drawing.bytes_across(axes)
            axes.set_xlabel(drawing.short(xlabel, 40))
            axes.set_title(drawing.short(title, int(width / 7)))
            drawing.legend(canvas, width)
        return canvas

    return Figure(name, alt, draw)


def _beside(found: Sequence[Figure]) -> list[Figure]:
    """Several in rows of two."""
    return [figure._replace(wide=len(found) == 1) for figure in found]


def _scores(results: Results, each: bool = False) -> list[tuple[str, str, dict[str, Score]]]:
    """What, its title, and the models' scores. each: of every task, then of their mean if there is one;
    else of the mean, or where there is none of every task."""
    means = mean_values(results)
    metric = results.records[0].metric
    found = []
    for task in results.tasks:
        records = [record for record in results.records if record.task == task]
        label = _label(task, records[0])
        found.append((task, label, {one.model: _score(one.value, one.stderr, one.metric) for one in records}))
    if len(results.tasks) == 1 or all(value is None for value in means.values()):
        return found
    mean = {m: _score(value, _error(results, m), metric) for m, value in means.items() if value is not None}
    label = _label("mean", results.records[0]).replace("mean: ", "mean ")
    return [*found, ("mean", label, mean)] if each else [("mean", label, mean)]


def _label(task: str, record: Record) -> str:
    lower = " (lower is better)" if record.direction == "lower" else ""
    return f"{task}: {record.metric}{', %' if record.metric in SHARES else ''}{lower}"


def _error(results: Results, model: str) -> float | None:
    """The standard error of a mean over tasks of other items each."""
    errors = [record.stderr for record in results.of(model).values()]
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known)) / len(errors) if len(known) == len(errors) else None


def _score(value: float, error: float | None, metric: str) -> Score:
    unit = 100.0 if metric in SHARES else 1.0
    return Score(unit * value, None if error is None else unit * error)


def _said(score: Score) -> str:
    return number(score.value, "") + ("" if score.error is None else f" ± {score.error:.2g}")
