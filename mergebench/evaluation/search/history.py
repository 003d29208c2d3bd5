"""The points of a search so far, in `search.json`: written after every point, so that a killed search can be
resumed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from mergebench.checkpoint.documents import read_json
from mergebench.checkpoint.files import part_of, write_atomically, write_error
from mergebench.checkpoint.target import contents, target_of
from mergebench.errors import RecipeError, RunError
from mergebench.evaluation.tables.layout import number

FAILED = 1e300
GIVEN_POINT = 0  # the number of the recipe as given
FILE, BEST, WORK = "search.json", "best.yaml", ".candidate"


@dataclass(frozen=True)
class Point:
    """One merge that was measured, or failed."""

    number: int  # from 0, the recipe as given
    values: Mapping[str, Any]  # by dimension
    tasks: Mapping[str, float]  # what was measured on each validation task
    objective: float | None  # None: it failed
    seconds: float
    error: str | None = None
    stderr: float | None = None  # of the objective, where every task has one


class _PointEntry(TypedDict):
    number: int
    values: dict[str, str | float | bool | None]
    tasks: dict[str, float]
    objective: float | None
    seconds: float
    error: str | None


class PointEntry(_PointEntry, total=False):
    """A point in `search.json`."""

    stderr: float | None


class Made(TypedDict):
    """What is read of the settings of a search."""

    objective: str
    direction: Literal["higher", "lower"]
    metrics: dict[str, str]


class Document(TypedDict):
    """`search.json`."""

    made: Made
    points: list[PointEntry]
    best: int | None


@dataclass
class History:
    """The points of one search, in order, with their settings; in `folder`."""

    folder: Path
    made: dict[str, Any]
    direction: str = "higher"  # which objectives are better
    metrics: dict[str, str] = field(default_factory=dict)  # by task; known after the first measured point
    points: list[Point] = field(default_factory=list)

    @property
    def metric(self) -> str:
        """What the objective is counted in: as accuracies, where it is a share of what the fine-tunes reach."""
        return next(iter(self.metrics.values()), "") if self.made["objective"] == "mean" else "accuracy"

    def said(self, point: Point) -> str:
        """A point's objective as tables show it, with its standard error; nothing if it failed."""
        if point.objective is None:
            return ""
        error = "" if point.stderr is None else f" ± {number(point.stderr, self.metric)}"
        return f"{number(point.objective, self.metric)}{error}"

    def cost(self, point: Point) -> float:
        """The objective, negated if higher is better; above all others if the point failed."""
        if point.objective is None:
            return FAILED
        return -point.objective if self.direction == "higher" else point.objective

    @property
    def ranked(self) -> list[Point]:
        """The measured points, the best first; of equal points, the earlier."""
        found = [point for point in self.points if point.objective is not None]
        return sorted(found, key=lambda point: (self.cost(point), point.number))

    @property
    def best(self) -> Point | None:
        return next(iter(self.ranked), None)

    def add(self, point: Point) -> None:
        self.points.append(point)
        self.save()

    def save(self) -> None:
        write_atomically(self.folder / FILE, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """The whole document, ready for JSON."""
        best = self.best
        return {
            "made": {**self.made, "direction": self.direction, "metrics": self.metrics},
            "points": [vars(point) for point in self.points],
            "best": None if best is None else best.number,
        }

    def resume(self) -> None:
        """Load the points of an interrupted search with the same settings from the folder."""
        found = read(self.folder)
        if found is None:
            return
        for name in SETTINGS:
            if found["made"].get(name) != json.loads(json.dumps(self.made.get(name))):
                what = f"{self.folder}: it holds a search with another {SETTINGS[name]}"
                raise RecipeError(what, "run it as before, choose another --out, or start afresh with --overwrite")
        self.direction, self.metrics = found["made"]["direction"], found["made"]["metrics"]
        known = Point.__annotations__.keys()
        self.points = [Point(**{name: point[name] for name in known & point.keys()}) for point in found["points"]]


SETTINGS = {
    "over": "--over",
    "strategy": "--strategy",
    "budget": "--budget",
    "seed": "--seed",
    "objective": "--objective",
    "suite": "suite, or other data",
    "merge": "recipe, or other inputs",
}


def read(folder: Path) -> dict[str, Any] | None:
    """The document in a folder; None where there is none."""
    try:
        found: dict[str, Any] = read_json(folder / FILE, Document)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / FILE}: not a search: {error}", "choose another --out") from None
    return found


@contextmanager
def held(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Lock the folder of a search for this process; files of an earlier search are kept or deleted."""
    target_of(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise RecipeError(f"{folder}: it exists and is not a directory", "choose another --out")
        begun = {WORK, part_of(FILE)}  # all there is of a search that was killed before its first point
        if folder.exists() and not {path.name for path in contents(folder)} <= begun:
            if read(folder) is None:
                raise RecipeError(f"{folder}: it exists and holds no search", "choose another --out")
            if not (resume or overwrite):
                hint = "continue with --resume, replace it with --overwrite, or choose another --out"
                raise RecipeError(f"{folder}: it holds a search", hint)
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise write_error(folder, error) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder}: another search is writing it", "wait for it, or choose another --out") from None
        if overwrite and not resume:
            for name in (BEST, "evaluation.json", "evaluation.md", "report.html", FILE):
                (folder / name).unlink(missing_ok=True)
        yield
    finally:
        os.close(lock)
