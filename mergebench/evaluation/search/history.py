"""The points of a search so far, in `search.json`: written after every point, so that a killed search can be
resumed."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
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
Costs = tuple[float, ...]  # of a point, by objective; lower is better
GIVEN_POINT = 0  # the number of the recipe as given
FILE, BEST, WORK = "search.json", "best.yaml", ".candidate"


@dataclass(frozen=True)
class Point:
    """One merge that was measured, or failed."""

    number: int  # from 0, the recipe as given
    values: Mapping[str, Any]  # by dimension
    tasks: Mapping[str, float]  # what was measured on each validation task
    objective: float | None  # None: it failed; the first of several
    seconds: float
    error: str | None = None
    stderr: float | None = None  # of the objective, where every task has one
    objectives: Mapping[str, float] = field(default_factory=dict)  # by name, where there are several
    stderrs: Mapping[str, float | None] = field(default_factory=dict)

    def of(self, name: str) -> tuple[float | None, float | None]:
        """An objective, and its standard error."""
        if name in self.objectives:
            return self.objectives[name], self.stderrs.get(name)
        return self.objective, self.stderr


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
    objectives: dict[str, float]
    stderrs: dict[str, float | None]


class _Made(TypedDict):
    objective: str
    direction: Literal["higher", "lower"]
    metrics: dict[str, str]


class Made(_Made, total=False):
    """What is read of the settings of a search."""

    directions: dict[str, Literal["higher", "lower"]]  # by objective, where there are several


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
    directions: dict[str, str] = field(default_factory=dict)  # by objective, where there are several

    @property
    def several(self) -> bool:
        """Whether there are several objectives."""
        return len(self.directions) > 1

    @property
    def objectives(self) -> list[str]:
        return list(self.directions) if self.several else [str(self.made["objective"])]

    def metric(self, name: str) -> str:
        """What an objective is counted in: as accuracies, where it is a share of what the fine-tunes reach."""
        return metric_of(name, self.metrics)

    def said(self, point: Point, name: str | None = None) -> str:
        """A point's objective (None: the first) as tables show it, with its standard error; nothing if it failed."""
        name = self.objectives[0] if name is None else name
        value, stderr = point.of(name)
        if value is None:
            return ""
        error = "" if stderr is None else f" ± {number(stderr, self.metric(name))}"
        return f"{number(value, self.metric(name))}{error}"

    def all_said(self, point: Point) -> str:
        """As `said`; of several objectives each with its name."""
        if not self.several:
            return self.said(point)
        return ", ".join(f"{name} {self.said(point, name)}" for name in self.objectives)

    def costs(self, point: Point) -> Costs:
        """The objectives, negated where higher is better; above all others if the point failed."""
        ways = list(self.directions.items()) or [("", self.direction)]
        if point.objective is None:
            return (FAILED,) * len(ways)
        values = [(way, point.objectives.get(name, point.objective)) for name, way in ways]
        return tuple(-value if way == "higher" else value for way, value in values)

    @property
    def ranked(self) -> list[Point]:
        """The measured points, the best first; of equal points, the earlier. Of several objectives, the front first."""
        found = [point for point in self.points if point.objective is not None]
        if not self.several:
            return sorted(found, key=lambda point: (self.costs(point), point.number))
        front = {point.number for point in self.front}
        return sorted(found, key=lambda point: (point.number not in front, self.costs(point), point.number))

    @property
    def front(self) -> list[Point]:
        """The points that no other beats in one objective without losing in another; of equal points the first."""
        found = [(self.costs(point), point) for point in self.points if point.objective is not None]
        kept = pareto([costs for costs, _ in found])
        return [found[place][1] for place in kept]

    @property
    def best(self) -> Point | None:
        """The first of the ranked; of several objectives the front's knee."""
        if self.several and self.front:
            return self.front[knee([self.costs(point) for point in self.front])]
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
            "made": {**self.made, "direction": self.direction, "metrics": self.metrics}
            | ({"directions": self.directions} if self.several else {}),
            "points": [vars(point) for point in self.points],
            "best": None if best is None else best.number,
            **({"front": [point.number for point in self.front]} if self.several else {}),
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
        self.directions = found["made"].get("directions", {})
        known = Point.__annotations__.keys()
        self.points = [Point(**{name: point[name] for name in known & point.keys()}) for point in found["points"]]


def metric_of(objective: str, metrics: Mapping[str, str]) -> str:
    """What an objective is counted in, from the tasks' metrics."""
    if objective == "mean":
        return next(iter(metrics.values()), "")
    return metrics.get(objective, "accuracy")


def pareto(costs: Sequence[Costs]) -> list[int]:
    """The places of costs that no other is as low as everywhere, and lower somewhere; of equal ones the first. Sorted
    by the first cost."""

    def beaten(place: int) -> bool:
        mine = costs[place]
        others = ((other, one) for other, one in enumerate(costs) if other != place)
        return any(
            all(a <= b for a, b in zip(one, mine, strict=True)) and (one != mine or other < place)
            for other, one in others
        )

    return sorted((place for place in range(len(costs)) if not beaten(place)), key=lambda place: costs[place])


def knee(front: Sequence[Costs]) -> int:
    """The place on a front that is nearest to the best of every cost, each scaled by its range on the front."""
    low, high = (tuple(map(way, zip(*front, strict=True))) for way in (min, max))

    def distance(costs: Costs) -> float:
        scaled = [(c - a) / (b - a) if b > a else 0.0 for c, a, b in zip(costs, low, high, strict=True)]
        return math.hypot(*scaled)

    return min(range(len(front)), key=lambda place: distance(front[place]))


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
