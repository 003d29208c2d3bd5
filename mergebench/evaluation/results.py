"""Results: one record for each model and task, and their origin, in one JSON document.

Tables, the model card and comparisons are views of the records, made by functions in `tables/`, `page/` and `compare/`;
means are computed, never stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from mergebench.checkpoint.documents import read_json
from mergebench.errors import RunError, counted
from mergebench.evaluation.task import Direction, Item, Prediction

Role = Literal["base", "input", "merged", "baseline"]
FILE = "evaluation.json"


@dataclass(frozen=True)
class Record:
    """One model's result on one task."""

    model: str
    role: Role
    task: str
    split: str
    metric: str
    direction: Direction  # which values are better
    value: float
    stderr: float | None  # of an accuracy p: sqrt(p (1 - p) / n)
    n: int  # items
    relative: float | None  # value / value of the task's own fine-tune; None if that was not measured
    seconds: float
    predictions: Mapping[str, Prediction] = field(repr=False)  # by the items' ids; in JSON [output, score]


class Entry(TypedDict):
    """A record in JSON."""

    model: str
    role: Role
    task: str
    split: str
    metric: str
    direction: Direction
    value: float
    stderr: float | None
    n: int
    relative: float | None
    seconds: float
    predictions: dict[str, tuple[str, float]]


class Failed(TypedDict):
    """A model that could not be measured."""

    model: str
    tasks: list[str]
    error: str
    hint: str | None


class Made(TypedDict, total=False):
    """What is read of the origin of results."""

    by_task: list[str]
    bytes: dict[str, int]  # by model: what it takes on disk, of an adapter without its base
    unedited: dict[str, list[str]]
    baseline: str | None
    chosen: str | None
    failed: list[Failed]


class _Document(TypedDict):
    made: Made
    records: list[Entry]


class Document(_Document, total=False):
    """evaluation.json."""

    items: dict[str, dict[str, tuple[str, str | None]]]


@dataclass(frozen=True)
class Results:
    """Every record, model by model in the order of the tables, and their origin."""

    made: Mapping[str, Any]
    records: tuple[Record, ...]
    items: Mapping[str, Mapping[str, Item]] = field(default_factory=dict)  # by task and id; in JSON [text, gold]

    def __repr__(self) -> str:
        return f"<Results: {counted(len(self.models), 'model')} on {counted(len(self.tasks), 'task')}>"

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(record.model for record in self.records))

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(record.task for record in self.records))

    def of(self, model: str) -> dict[str, Record]:
        """A model's records by task."""
        return {record.task: record for record in self.records if record.model == model}

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read `evaluation.json`, from the file or its directory; `RunError` if it holds something else."""
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            found = read_json(path, Document)
        except OSError as error:
            hint = "name a directory that mergebench merge, eval or search wrote"
            raise RunError(f"{path}: cannot be read: {error.strerror}", hint) from None
        except ValueError as error:
            hint = "evaluate again: mergebench writes evaluation.json"
            raise RunError(f"{path}: not an evaluation: {error}", hint) from None
        items = {task: {item: Item(*one) for item, one in of.items()} for task, of in found.get("items", {}).items()}
        return cls(found["made"], tuple(_record(entry) for entry in found["records"]), items)


def mean_values(results: Results) -> dict[str, float | None]:
    """Each model's mean over the tasks; None if tasks are missing or have different metrics."""
    comparable = len({(record.metric, record.direction) for record in results.records}) == 1
    out: dict[str, float | None] = {}
    for model in results.models:
        values = [record.value for record in results.of(model).values()]
        out[model] = _mean(values, len(results.tasks)) if comparable else None
    return out


def mean_relatives(results: Results) -> dict[str, float | None]:
    """Each model's mean over the tasks of value / value of the task's own fine-tune; None if any is unknown."""
    one_way = len({record.direction for record in results.records}) == 1
    out: dict[str, float | None] = {}
    for model in results.models:
        known = [record.relative for record in results.of(model).values() if record.relative is not None]
        out[model] = _mean(known, len(results.tasks)) if one_way else None
    return out


def _mean(values: list[float], wanted: int) -> float | None:
    return sum(values) / wanted if len(values) == wanted else None


def with_relatives(records: list[Record], homes: Mapping[str, str]) -> tuple[Record, ...]:
    """The records with `relative` filled in; `homes` names each task's own fine-tune, if there is one."""
    own = {record.task: record.value for record in records if homes.get(record.task) == record.model}
    return tuple(
        replace(record, relative=record.value / own[record.task] if own.get(record.task) else None)
        for record in records
    )


_NAMES = frozenset(one.name for one in fields(Record))


def _record(entry: dict[str, Any]) -> Record:
    """A record of the document. Keys of later versions are passed over."""
    known = {name: value for name, value in entry.items() if name in _NAMES}
    for name in ("value", "seconds"):
        known[name] = float(known[name])
    answers = known["predictions"].items()
    known["predictions"] = {item: Prediction(output, float(score)) for item, (output, score) in answers}
    return Record(**known)
