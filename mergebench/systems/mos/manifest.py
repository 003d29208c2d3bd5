"""The manifest `bank.json` of a bank: its backbone, its settings, and the classes of each task.

{"mergebench": version,
 "backbone": {"model": reference, "sha256": of its contents},
 "features": {"kind": "image", "pooling": "cls", "max_length": null},
 "adapter": {"kind": "bottleneck", "scale": 0.1, "bottleneck": 16},
 "statistics": "covariance", "semantics": "paper", "alpha": 0.1, "seed": 0, "epochs": 20, "batch": 48,
 "items": {"test": "cache/test.jsonl", "id": "id", "content": "image", "label": "label"},
 "tasks": [{"name": "01", "classes": ["3", "7"], "files": {"adapters/01.safetensors": sha256, ...}}]}
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from mergebench.checkpoint.documents import document
from mergebench.checkpoint.files import write_atomically
from mergebench.errors import ModelError
from mergebench.parameters import make_params, param, parameters_of
from mergebench.recipe.positions import show

T = TypeVar("T")
MANIFEST = "bank.json"
MERGED = "merged"  # of the banks of a run, the one whose adapters are merged
ADAPTER, HEAD, TRAINED, CLASSES = FILES = (
    "adapters/{}.safetensors",
    "heads/{}.safetensors",
    "heads/{}.trained.safetensors",
    "classes/{}.safetensors",
)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    model: str  # as the user wrote it
    sha256: str  # of its files' contents


@dataclass(frozen=True, kw_only=True)
class Features:
    kind: Literal["image", "text"]
    pooling: Literal["mean", "cls", "cls+mean"]
    max_length: int | None = param(None, low=1)  # tokens a text is cut to


@dataclass(frozen=True, kw_only=True)
class AdapterKind:
    kind: Literal["bottleneck"]
    scale: float
    bottleneck: int = param(low=1)


@dataclass(frozen=True, kw_only=True)
class Items:
    """The columns of a file of items, and the file that the bank is to be tested on."""

    test: str | None = None
    id: str = "id"
    content: str | None = None  # text or image where not given
    label: str = "label"


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    name: str  # 01, 02, ...
    classes: tuple[str, ...]
    files: dict[str, str]  # the SHA-256 of each


@dataclass(frozen=True, kw_only=True)
class About:
    """The whole of bank.json."""

    mergebench: str
    backbone: Backbone
    features: Features
    adapter: AdapterKind
    statistics: Literal["covariance", "variance", "centroids"]
    semantics: Literal["paper", "reference"]
    alpha: float = param(low=0, high=1)
    seed: int = param(low=0)
    epochs: int = param(20, low=0)  # of a task's training; 0: the adapters add nothing
    batch: int = param(48, low=1)  # items of a training step
    items: Items = Items()
    tasks: tuple[TaskEntry, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Of all tasks, in their order."""
        return tuple(name for task in self.tasks for name in task.classes)

    def check(self, file: Path) -> None:
        """`ModelError` where tasks are missing, a class is claimed twice, or the texts' length is not known."""
        if (self.features.max_length is None) != (self.features.kind == "image"):
            raise ModelError(f"{file}: features.max_length: texts have one, images have none", COMPLETE)
        home: dict[str, str] = {}
        for number, task in enumerate(self.tasks):
            if task.name != name_of(number):
                raise ModelError(f"{file}: task {name_of(number)} is missing: '{task.name:.20}' follows", COMPLETE)
            if task.files.keys() != {pattern.format(task.name) for pattern in FILES}:
                raise ModelError(f"{file}: task {task.name}: its files are not those of a task", COMPLETE)
            if not task.classes:
                raise ModelError(f"{file}: task {task.name} has no classes", "a task has at least one")
            for one in task.classes:
                if one in home:
                    what = f"class '{one:.60}' is claimed by task {home[one]} and again by task {task.name}"
                    raise ModelError(f"{file}: {what}", "a class belongs to one task")
                home[one] = task.name

    def write(self, directory: Path) -> None:
        """Put it in place at once."""
        write_atomically(directory / MANIFEST, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


COMPLETE = "a bank is read whole, as mergebench cil run wrote it"


def name_of(task: int) -> str:
    """What a task is called in a bank: 01 is task 0."""
    return f"{task + 1:02}"


def read_manifest(directory: Path) -> About:
    """Read and check bank.json; `ModelError` where there is none or it does not fit, `RunError` where it is broken."""
    file = directory / MANIFEST
    what = "no such directory" if not directory.exists() else f"not a bank: it has no {MANIFEST}"
    inside = [file.parent for file in directory.glob(f"*/*/{MANIFEST}")]  # a seed and a kind each, as cil run has them
    best = min(inside, key=lambda bank: (bank.name != MERGED, bank), default=None)
    hint = "mergebench cil run writes banks" if best is None else f"it holds banks, such as {best}"
    found = document(file, Any, COMPLETE, ModelError(f"{directory}: {what}", hint))
    try:
        about = _read(About, found)
    except _Wrong as error:
        raise ModelError(f"{file}: {error}", COMPLETE) from None
    about.check(file)
    return about


class _Wrong(Exception):
    """`where: what` of the first thing that does not belong into a manifest."""


def _read(kind: type[T], value: Any, where: str = "") -> T:
    """A dataclass out of JSON of exactly its keys and types; `_Wrong` where it is something else."""
    if not isinstance(value, dict):
        raise _Wrong(f"{where or 'the document'}: must be a mapping, got {show(value)}")
    dot = f"{where}." if where else ""
    parameters, values = parameters_of(kind), {}
    for name, entry in value.items():
        here = f"{dot}{name}"
        if name not in parameters:
            raise _Wrong(f"{here}: no such key")
        parameter = parameters[name]
        if entry is None and parameter.default is None:
            continue
        complaint = parameter.complaint(entry)
        if complaint is not None:
            raise _Wrong(f"{here}: {complaint}, got {show(entry)}")
        values[name] = _part(parameter.type, parameter.plain(entry), here)
    for parameter in parameters.values():
        if parameter.required and parameter.name not in values:
            raise _Wrong(f"{dot}{parameter.name}: missing")
    made: T = make_params(kind, values)
    return made


def _part(kind: Any, value: Any, where: str) -> Any:
    """What a key holds: a dataclass, several of them, texts, or a value that is checked already."""
    if is_dataclass(kind) and isinstance(kind, type):
        return _read(kind, value, where)
    if get_origin(kind) is tuple:
        each = get_args(kind)[0]
        if not isinstance(value, list) or (each is str and not all(isinstance(one, str) and one for one in value)):
            raise _Wrong(f"{where}: must be a list{' of texts' if each is str else ''}, got {show(value)}")
        return tuple(value if each is str else (_read(each, one, f"{where}.{i}") for i, one in enumerate(value)))
    if get_origin(kind) is dict and not (isinstance(value, dict) and all(isinstance(v, str) for v in value.values())):
        raise _Wrong(f"{where}: must be a mapping of texts, got {show(value)}")
    return value
