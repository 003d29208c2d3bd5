"""A search: its objective against each parameter, and the two tasks that pull apart most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from mergebench.evaluation.layout import NONE
from mergebench.evaluation.tables import Cell
from mergebench.page import figures
from mergebench.page.figures import BLUE, INK, LINE, ORANGE, PAPER, SOFT, Figure
from mergebench.page.parts import Fold, Gallery, Part, Section, Table, cells
from mergebench.page.sources import Sources

Document = Mapping[str, Any]
Point = Mapping[str, Any]
SHOWN = 10  # points in the table


def sections(sources: Sources) -> Iterator[Section]:
    """Plots where there are two points or more, the best points, the ones that failed."""
    if sources.search is None:
        return
    points, failed, best = _points(sources.search)
    if not points:
        if failed:
            yield Section("Search", [_failures(failed)])
        return
    names = list(dict.fromkeys(name for point in points for name in point["values"]))
    tasks = list(dict.fromkeys(task for point in points for task in point["tasks"]))
    drawn = [_against(points, best, name, place) for place, name in enumerate(names)] if len(points) > 1 else []
    drawn += [_trade_off(points, best, *pair)] if (pair := _apart(points, tasks)) is not None else []
    caption = f"Each dot is one of {len(points)} merges, measured on validation data. Star: the best."
    if pair is not None:
        caption += f" The last plot: {pair[0]} and {pair[1]}, the two tasks that pull apart most; "
        caption += "on its line, no other point is better in both."
    order = sorted(points, key=lambda point: (point is not best, -point["objective"]))
    heads = ["point", *names, "objective", *tasks]
    note = f"The best {min(SHOWN, len(points))} of {len(points)} points; all are in search.json."
    rows = [_row(point, best, names, tasks) for point in order[:SHOWN]]
    parts: list[Part] = [Gallery(drawn, caption)] if drawn else []
    parts += [Table(heads, rows, note), *([_failures(failed)] if failed else [])]
    yield Section("Search", parts)


def size(search: Document) -> str:
    """How much was tried."""
    points, failed, _ = _points(search)
    count = len(points) + len(failed)
    return f"{count} point{'s' * (count != 1)} tried" + (f", {len(failed)} failed" if failed else "")


def finding(search: Document) -> list[str]:
    """The best point in a sentence."""
    points, _, best = _points(search)
    if best is None:
        return ["No point of the search could be measured."]
    objective = search.get("made", {}).get("objective", "objective")
    return [f"Best of {len(points)} points on validation: {_values(best)} ({objective} {best['objective']:.4g})."]


def _points(search: Document) -> tuple[list[Point], list[Point], Point | None]:
    """Those that were measured, those that failed, the best."""
    points = [point for point in search.get("points", []) if point.get("objective") is not None]
    failed = [point for point in search.get("points", []) if point.get("objective") is None]
    return points, failed, next((point for point in points if point["number"] == search.get("best")), None)


def _row(point: Point, best: Point | None, names: Sequence[str], tasks: Sequence[str]) -> list[Cell]:
    values = [_value(point["values"].get(name)) for name in names]
    scores = [_value(point["tasks"].get(task)) for task in tasks]
    star = " ★" if point is best else ""
    return [Cell(f"{point['number']}{star}", point is best), *cells(*values, _value(point["objective"]), *scores)]


def _failures(failed: Sequence[Point]) -> Fold:
    rows = [
        cells(
            str(p["number"]), ", ".join(f"{k} {_value(v)}" for k, v in p["values"].items()), str(p.get("error") or "")
        )
        for p in failed
    ]
    return Fold(f"{len(failed)} failed", [Table(["point", "values", "error"], rows, "Points that failed.", words=3)])


def _values(point: Point) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in point["values"].items())


def _value(value: Any) -> str:
    if value is None:
        return NONE
    return f"{value:.4g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _against(points: Sequence[Point], best: Point | None, name: str, place: int) -> Figure:
    """The objective over one parameter; words are set side by side."""
    known = [point for point in points if name in point["values"]]
    raw = [point["values"][name] for point in known]
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in raw)
    words = sorted({_value(value) for value in raw})
    xs = [float(value) if numeric else float(words.index(_value(value))) for value in raw]
    with figures.plot(220) as (canvas, axes):
        _dots(axes, xs, [point["objective"] for point in known], [point is best for point in known])
        if not numeric:
            axes.set_xticks(range(len(words)), [figures.short(word) for word in words])
        axes.set_xlabel(figures.short(name, 40))
        axes.set_ylabel("objective")
        alt = f"Objective of {len(known)} points against {name}."
        if best is not None and name in best["values"]:
            alt += f" The best is at {_value(best['values'][name])}: {best['objective']:.4g}."
        return Figure(figures.to_svg(canvas, f"search{place}"), alt)


def _apart(points: Sequence[Point], tasks: Sequence[str]) -> tuple[str, str] | None:
    """The two tasks with the lowest correlation over the points."""
    import numpy as np

    known = [point["tasks"] for point in points if all(point["tasks"].get(task) is not None for task in tasks)]
    values = {task: np.array([scores[task] for scores in known]) for task in tasks}
    moved = [task for task in tasks if len(known) > 2 and values[task].std() > 0]
    pairs = list(combinations(moved, 2))
    if not pairs:
        return None
    return min(pairs, key=lambda pair: float(np.corrcoef(values[pair[0]], values[pair[1]])[0, 1]))


def _trade_off(points: Sequence[Point], best: Point | None, x: str, y: str) -> Figure:
    """Two tasks against each other, with the points that none beats in both."""
    known = [point for point in points if x in point["tasks"] and y in point["tasks"]]
    places = [(point["tasks"][x], point["tasks"][y]) for point in known]
    front = _front(places)
    with figures.plot(220) as (canvas, axes):
        axes.plot(*zip(*front, strict=True), color=SOFT, linewidth=1, zorder=1)
        _dots(axes, [p[0] for p in places], [p[1] for p in places], [point is best for point in known])
        axes.set_xlabel(figures.short(x, 40))
        axes.set_ylabel(figures.short(y, 30))
        alt = f"{y} against {x} for {len(known)} points; {len(front)} are not beaten in both."
        return Figure(figures.to_svg(canvas, "tradeoff"), alt)


def _front(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that none beats in both, from the right."""
    front: list[tuple[float, float]] = []
    for place in sorted(places, reverse=True):
        if not front or place[1] > front[-1][1]:
            front.append(place)
    return front


def _dots(axes: Any, xs: Sequence[float], ys: Sequence[float], best: Sequence[bool]) -> None:
    axes.grid(True, color=LINE)
    others = [(x, y) for x, y, star in zip(xs, ys, best, strict=True) if not star]
    stars = [(x, y) for x, y, star in zip(xs, ys, best, strict=True) if star]
    if others:
        axes.scatter(*zip(*others, strict=True), s=26, color=BLUE, edgecolor=PAPER, linewidth=0.5, zorder=2)
    if stars:
        axes.scatter(*zip(*stars, strict=True), s=170, marker="*", color=ORANGE, edgecolor=INK, linewidth=0.8, zorder=3)
