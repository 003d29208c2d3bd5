"""The points of a search as a table."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mergebench.cli.output import note, say, say_text, width
from mergebench.errors import counted

if TYPE_CHECKING:
    from mergebench.evaluation import Results
    from mergebench.evaluation.search.history import History
    from mergebench.evaluation.tables.sheet import Sheet

SHOWN = 8  # points in the table, beside the recipe as given and those of a front


def note_points(history: History, resumed: int, word: str, quiet: bool) -> None:
    """How many points came from an earlier run, and how many failed; word: what a point is called."""
    points = history.points
    of = counted(len(points), word)
    note(f"{resumed} of {of} were measured before", quiet or not resumed)
    failed = [point for point in points if point.objective is None]
    if failed:
        note(f"{len(failed)} of {of} failed, the first: {failed[0].error}", quiet)


def say_points(history: History, results: Results | None) -> None:
    """The best points, and what was measured on test tasks."""
    from mergebench.evaluation import report

    lines = points_sheet(history).terminal(width=width())
    say_text("\n".join([_head(history), *lines]).rstrip() + "\n")
    if results is not None:
        say_text(report(results, width=width(), styled=sys.stdout.isatty()))
        say()


def _head(history: History) -> str:
    """What stands above the table."""
    if not history.several:
        return "On validation, the best points:"
    ways = ", ".join(f"{name} ({way} is better)" for name, way in history.directions.items())
    return f"On validation, the front of {ways}:"


def points_sheet(history: History, shown: int | None = SHOWN) -> Sheet:
    """The best points, or those of the front, and the recipe as given; shown: None for all."""
    from mergebench.evaluation.search.history import GIVEN_POINT
    from mergebench.evaluation.tables.layout import number
    from mergebench.evaluation.tables.sheet import Cell, Sheet

    metrics, best = history.metrics, history.best
    front = {point.number for point in history.front} if history.several else set()
    names = list(dict.fromkeys(name for point in history.ranked for name in point.values))
    tasks = [task for task in metrics if task not in history.objectives]
    heads = ["point", "", *names, *tasks, *history.objectives]
    rows = []
    for place, point in enumerate(history.ranked):
        listed = point.number in front if history.several else place < (shown or 0)
        if shown is None or listed or point.number == GIVEN_POINT:
            about = [str(history.made.get("start", "as given"))] * (point.number == GIVEN_POINT)
            about += ["chosen"] * (history.several and point is best)
            values = [_value(point.values.get(name)) for name in names]
            scores = [number(point.tasks[task], metrics[task]) for task in tasks]
            said = [history.said(point, name) for name in history.objectives]
            reached = [Cell(text, parts=tuple(text.split(" ± "))) for text in said]
            rows.append([*map(Cell, (str(point.number), ", ".join(about), *values, *scores)), *reached])
    first = len(heads) - len(history.objectives)
    errors = {first + place: (name, f"{name} ±") for place, name in enumerate(history.objectives)}
    return Sheet(heads, rows, left=0, parts={1: ("given",), **errors})


def _value(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()
