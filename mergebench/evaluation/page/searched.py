"""A search: its objective against each parameter, and the two tasks that pull apart most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from mergebench.checkpoint import drawing
from mergebench.checkpoint.drawing import BLUE, GREY, INK, PAPER, SOFT
from mergebench.errors import counted
from mergebench.evaluation.page import figures
from mergebench.evaluation.page.figures import Figure
from mergebench.evaluation.page.parts import Fold, Gallery, Part, Section, Table, cells
from mergebench.evaluation.page.sources import Sources
from mergebench.evaluation.search.history import metric_of
from mergebench.evaluation.tables.layout import NONE, SHARES, number
from mergebench.evaluation.tables.results import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Point = Mapping[str, Any]
SHOWN = 10  # points in the table


@dataclass(frozen=True)
class Search:
    """What `search.json` says."""

    made: Mapping[str, Any]
    points: Sequence[Point]  # that were measured, in their order
    failed: Sequence[Point]
    best: Point | None
    front: Sequence[Point] = ()  # of several objectives

    @property
    def objectives(self) -> list[str]:
        return list(self.made.get("directions", {})) or [self.objective]

    @property
    def start(self) -> str:
        return str(self.made.get("start") or "recipe as given")

    def reached(self, point: Point, name: str) -> tuple[float, float | None]:
        """An objective of a point, and its standard error."""
        several = point.get("objectives") or {name: point["objective"]}
        return several[name], (point.get("stderrs") or {name: point.get("stderr")}).get(name)

    @property
    def objective(self) -> str:
        return str(self.made.get("objective", "objective"))

    @property
    def higher(self) -> bool:
        """Which objectives are better."""
        return bool(self.made.get("direction", "higher") == "higher")

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for point in self.points for task in point["tasks"]))

    @property
    def one_scale(self) -> bool:
        """Whether the tasks have one metric, and it is known which values of it are better."""
        metrics = {self.metric(task) for task in self.tasks}
        return len(metrics) == 1 and (self.objective == "mean" or metrics <= set(SHARES))

    def metric(self, task: str) -> str:
        return str(self.made.get("metrics", {}).get(task, ""))

    def metric_of(self, name: str) -> str:
        return metric_of(name, self.made.get("metrics", {}))

    @property
    def objective_metric(self) -> str:
        return self.metric_of(self.objectives[0])

    def unit(self, metric: str) -> float:
        return 100.0 if metric in SHARES else 1.0

    def said(self, objective: float) -> str:
        """An objective as text."""
        return number(objective, self.objective_metric)


def read(document: Mapping[str, Any]) -> Search:
    points = document.get("points", [])
    measured = [point for point in points if point.get("objective") is not None]
    failed = [point for point in points if point.get("objective") is None]
    best = next((point for point in measured if point["number"] == document.get("best")), None)
    front = [point for point in measured if point["number"] in document.get("front", ())]
    return Search(document.get("made", {}), measured, failed, best, front)


def sections(sources: Sources) -> Iterator[Section]:
    """Plots where there are two points or more, the best points, the ones that failed."""
    search = read(sources.search or {})
    points, best = search.points, search.best
    failed = [_failures(search.failed)] if search.failed else []
    if not points:
        if failed:
            yield Section("Search", failed)
        return
    names = list(dict.fromkeys(name for point in points for name in point["values"]))
    moved = [name for name in names if len({_value(point["values"].get(name)) for point in points}) > 1]
    several = len(search.objectives) > 1
    lines = search.tasks if len(moved) == 1 and search.one_scale and search.objective == "mean" else []
    drawn = [] if several else [_against(search, name, lines) for name in moved]
    caption = f"Each dot is one of {len(points)} merges, measured on validation data. Star: the best."
    caption += f" Diamond: the {search.start}." if best is not points[0] else ""
    caption += " Whiskers are the standard error." if any(point.get("stderr") for point in points) else ""
    caption += " Lines: the tasks, whose mean the other marks are." if len(lines) > 1 else ""
    if several:
        drawn.append(_front_of(search))
        caption += f" The front of {_and(search.objectives)}: {len(search.front)} of {len(points)} points, which no "
        caption += "other beats in one without losing in another; the star is the nearest to the best of each."
    pair = _apart(points, search.tasks) if search.one_scale and not several else None
    if pair is not None:
        drawn.append(_trade_off(search, *pair))
        caption += f" The last plot: {pair[0]} and {pair[1]}, the two tasks that pull apart most; "
        caption += "on its line, no other point is better in both."
    sign = -1 if search.higher else 1
    order = sorted(points, key=lambda point: (point is not best, sign * point["objective"]))
    note = f"The best {min(SHOWN, len(points))} of {len(points)} points; all are in search.json."
    if several:
        order, note = [*search.front], "The points of the front, with standard errors; all are in search.json."
    tasks = [task for task in search.tasks if task not in search.objectives]
    heads = ["point", *names, *search.objectives, *tasks]
    parts: list[Part] = [Gallery(drawn, caption)] if drawn else []
    rows = [_row(search, point, names, tasks) for point in (order if several else order[:SHOWN])]
    parts += [Table(heads, rows, note), *failed]
    yield Section("Search", parts)


def size(document: Mapping[str, Any]) -> str:
    """How much was tried."""
    search = read(document)
    count = len(search.points) + len(search.failed)
    return f"{counted(count, 'point')} tried" + (f", {len(search.failed)} failed" if search.failed else "")


def finding(document: Mapping[str, Any]) -> list[str]:
    """The best point in a sentence."""
    search = read(document)
    if search.best is None:
        return ["No point of the search could be measured."]
    if len(search.objectives) > 1:
        values = ", ".join(f"{name} {_said(search, search.best, name)}" for name in search.objectives)
        front = (
            f"The front of {_and(search.objectives)} has {counted(len(search.front), 'point')} of {len(search.points)}"
        )
        return [f"{front}; chosen: {_values(search.best)} ({values})."]
    given = search.points[0]
    first = f"; {search.start.removeprefix('recipe ')} {search.said(given['objective'])}"
    beside = first if given is not search.best else f", the {search.start}"
    value = search.said(search.best["objective"])
    return [f"Best of {len(search.points)} on validation: {_values(search.best)} ({search.objective} {value}{beside})."]


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]])


def _said(search: Search, point: Point, name: str) -> str:
    value, error = search.reached(point, name)
    beside = "" if error is None or len(search.objectives) < 2 else f" ± {number(error, search.metric_of(name))}"
    return f"{number(value, search.metric_of(name))}{beside}"


def _row(search: Search, point: Point, names: Sequence[str], tasks: Sequence[str]) -> list[Cell]:
    values = [_value(point["values"].get(name)) for name in names]
    scores = [number(point["tasks"][t], search.metric(t)) if t in point["tasks"] else NONE for t in tasks]
    reached = [_said(search, point, name) for name in search.objectives]
    return [Cell(str(point["number"]), point is search.best), *cells(*values, *reached, *scores)]


def _failures(failed: Sequence[Point]) -> Fold:
    rows = [cells(str(point["number"]), _values(point), str(point.get("error") or "")) for point in failed]
    return Fold(f"{len(failed)} failed", [Table(["point", "values", "error"], rows, "Points that failed.", words=3)])


def _values(point: Point) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in point["values"].items())


def _value(value: Any) -> str:
    if value is None:
        return NONE
    return f"{value:.4g}" if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _against(search: Search, name: str, tasks: Sequence[str]) -> Figure:
    """The objective over one parameter, and the tasks that it is the mean of; words are set side by side."""
    known = [point for point in search.points if name in point["values"]]
    raw = [point["values"][name] for point in known]
    numeric = all(map(_is_number, raw))
    words = sorted({_value(value) for value in raw})
    xs = [float(value) if numeric else float(words.index(_value(value))) for value in raw]
    unit = search.unit(search.objective_metric)
    ys = [(unit * point["objective"], _times(unit, point.get("stderr"))) for point in known]

    lines = list(tasks) if numeric and len(tasks) > 1 else []

    def draw(width: float) -> Canvas:
        with figures.plot(width, 220 + drawing.legend_height(lines, width)) as (canvas, axes):
            for place, task in enumerate(lines):
                there = sorted((x, unit * one["tasks"][task]) for x, one in zip(xs, known, strict=True))
                look = drawing.look(place + 1)
                style: Any = {"color": look.colour, "marker": look.mark, "linestyle": look.dashes, "markersize": 4}
                axes.plot(*zip(*there, strict=True), label=drawing.short(task), linewidth=1.2, **style)
            _dots(search, axes, known, [(x, None) for x in xs], ys)
            if lines:
                drawing.legend(canvas, width)
            if not numeric:
                axes.set_xticks(range(len(words)), [drawing.short(word) for word in words])
            axes.set_xlabel(drawing.short(name, 40))
            what = search.objective_metric if lines else search.objective
            what += ", %" if unit == 100 else ""
            axes.set_ylabel(what + ("" if search.higher else " (lower is better)"))
        return canvas

    alt = f"{search.objective} of {len(known)} points against {name}."
    if search.best is not None and name in search.best["values"]:
        alt += f" The best is at {_value(search.best['values'][name])}: {search.said(search.best['objective'])}."
    return Figure(figures.slug("search", name), alt, draw)


def _apart(points: Sequence[Point], tasks: Sequence[str]) -> tuple[str, str] | None:
    """The two tasks with the lowest correlation over the points."""
    import numpy as np

    known = [point["tasks"] for point in points if all(task in point["tasks"] for task in tasks)]
    values = {task: np.array([scores[task] for scores in known]) for task in tasks}
    moved = [task for task in tasks if len(known) > 2 and values[task].std() > 0]
    pairs = list(combinations(moved, 2))
    if not pairs:
        return None
    return min(pairs, key=lambda pair: float(np.corrcoef(values[pair[0]], values[pair[1]])[0, 1]))


def _trade_off(search: Search, x: str, y: str) -> Figure:
    """Two tasks against each other, with the Pareto front."""
    known = [point for point in search.points if x in point["tasks"] and y in point["tasks"]]
    units = search.unit(search.metric(x)), search.unit(search.metric(y))
    places = [(units[0] * point["tasks"][x], units[1] * point["tasks"][y]) for point in known]
    front = _front(places, search.higher)

    def draw(width: float) -> Canvas:
        with figures.plot(width, 220) as (canvas, axes):
            axes.plot(*zip(*front, strict=True), color=SOFT, linewidth=1, zorder=1)
            _dots(search, axes, known, [(a, None) for a, _ in places], [(b, None) for _, b in places])
            for task, named in ((x, axes.set_xlabel), (y, axes.set_ylabel)):
                named(drawing.short(task, 30) + (", %" if search.metric(task) in SHARES else ""))
        return canvas

    alt = f"{y} against {x} for {len(known)} points; {len(front)} are not beaten in both."
    return Figure("search-trade-off", alt, draw)


def _front_of(search: Search) -> Figure:
    """The first two objectives against each other, with standard errors; the front's points on a line."""
    x, y = search.objectives[:2]

    def places(points: Sequence[Point], name: str) -> list[tuple[float, float | None]]:
        unit = search.unit(search.metric_of(name))
        reached = [search.reached(point, name) for point in points]
        return [(unit * value, _times(unit, error)) for value, error in reached]

    line = sorted((a, b) for (a, _), (b, _) in zip(places(search.front, x), places(search.front, y), strict=True))

    def draw(width: float) -> Canvas:
        with figures.plot(width, 260) as (canvas, axes):
            axes.plot(*zip(*line, strict=True), color=SOFT, linewidth=1, zorder=1)
            _dots(search, axes, search.points, places(search.points, x), places(search.points, y))
            for name, named in ((x, axes.set_xlabel), (y, axes.set_ylabel)):
                unit = ", %" if search.metric_of(name) in SHARES else ""
                named(f"{drawing.short(name, 30)}{unit} ({search.made['directions'][name]} is better)")
        return canvas

    return Figure("search-front", f"{y} against {x}; {len(search.front)} points are the front.", draw, wide=True)


def _front(places: Sequence[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """The Pareto front of the points, sorted by the first value, the best first."""
    sign = 1 if higher else -1
    front: list[tuple[float, float]] = []
    for place in sorted(places, key=lambda place: (sign * place[0], sign * place[1]), reverse=True):
        if not front or sign * place[1] > sign * front[-1][1]:
            front.append(place)
    return front


def _dots(
    search: Search,
    axes: Axes,
    points: Sequence[Point],
    xs: Sequence[tuple[float, float | None]],
    ys: Sequence[tuple[float, float | None]],
) -> None:
    """Values with their standard errors; the best as a star, the recipe as given (the first point) as a diamond."""
    axes.grid(True)
    for point, (x, wide), (y, high) in zip(points, xs, ys, strict=True):
        axes.errorbar(x, y, xerr=wide, yerr=high, color=GREY, elinewidth=0.6, zorder=1)
        if point is search.best:
            axes.scatter(x, y, s=170, marker="*", color=BLUE, edgecolor=INK, linewidth=0.8, zorder=3)
        elif point is search.points[0]:
            axes.scatter(x, y, s=50, marker="D", facecolor=PAPER, edgecolor=INK, linewidth=1.2, zorder=3)
        else:
            axes.scatter(x, y, s=26, color=GREY, edgecolor=PAPER, linewidth=0.5, zorder=2)


def _times(unit: float, error: float | None) -> float | None:
    return None if error is None else unit * error
