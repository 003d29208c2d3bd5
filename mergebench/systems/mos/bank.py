"""A bank: the adapter, heads and class statistics of each task, a safetensors file each, and a manifest of classes.

    bank.json                    the manifest, written last (manifest.py)
    adapters/01.safetensors      BLOCK.down.weight [r, d], .down.bias [r], .up.weight [d, r], .up.bias [d]
    heads/01.safetensors         a head (evaluation/head.py) of all classes so far, after the alignment of this task
    heads/01.trained.safetensors the rows of this task's classes, as training left them
    classes/01.safetensors       features under this task's adapter: mean [c, d], count [c], and covariance [c, d, d],
                                 variance [c, d] or centroids and within [c, k, d] (statistics.py); prototype
                                 [c, d]: means under the first task's adapter; frozen [c, d]: means under none

A stage needs only the files of the tasks up to it, so a finished bank can answer as at any stage. Only `BankWriter`,
which adds a task, writes into a bank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mergebench.checkpoint.documents import read_bytes
from mergebench.checkpoint.files import read_tensors, write_atomically, write_error
from mergebench.checkpoint.header import damaged, read_header
from mergebench.checkpoint.shards import as_file
from mergebench.errors import ModelError, RecipeError, RunError, did_you_mean
from mergebench.evaluation.head import Head, read_head
from mergebench.networks.bottleneck import PARTS
from mergebench.networks.features import Pooling
from mergebench.systems.mos.manifest import (
    ADAPTER,
    CLASSES,
    COMPLETE,
    HEAD,
    MANIFEST,
    TRAINED,
    About,
    TaskEntry,
    name_of,
    read_manifest,
)


@dataclass(frozen=True)
class Stored:
    """One task's files in memory, checked; the spread of its classes stays on the disk."""

    adapter: dict[str, Tensor]
    head: Head  # after alignment, all classes so far
    trained: Head  # this task's classes
    prototype: Tensor  # [c, d]
    frozen: Tensor  # [c, d]


class Bank:
    """A bank, read whole and checked; made by `read_bank`."""

    def __init__(self, directory: Path, about: About) -> None:
        self.directory, self.about = directory, about
        self._stored: dict[int, Stored] = {}
        for task in range(len(about.tasks)):
            self._stored[task] = _read(directory, about, task, self._stored.get(0))

    @property
    def tasks(self) -> tuple[TaskEntry, ...]:
        return self.about.tasks

    @property
    def classes(self) -> tuple[str, ...]:
        return self.about.classes

    @cached_property
    def task_of(self) -> Tensor:
        """[C] int64: the task of each class."""
        return torch.tensor([number for number, task in enumerate(self.tasks) for _ in task.classes])

    def numbers(self, labels: Sequence[str]) -> Tensor:
        """[n] int64: the class numbers of labels; `RunError` if a label is unknown."""
        number = {name: i for i, name in enumerate(self.classes)}
        for label in labels:
            if label not in number:
                what = f"label '{label:.60}' is none of the classes of {self.directory}"
                raise RunError(what, did_you_mean(label, number))
        return torch.tensor([number[label] for label in labels])

    @property
    def width(self) -> int:
        """d: of the features."""
        return self._stored[0].head.weight.shape[1]

    def classes_at(self, stage: int) -> tuple[str, ...]:
        """The classes of the tasks up to a stage."""
        return self.classes[: len(self._stored[stage].head.labels)]

    def adapter(self, task: int) -> dict[str, Tensor]:
        """A copy, so that changes to it do not change the bank."""
        return {name: tensor.clone() for name, tensor in self._stored[task].adapter.items()}

    def head(self, stage: int) -> Head:
        """The head after the alignment of that stage."""
        return self._stored[stage].head

    def trained(self, stage: int) -> Head:
        """The rows of all classes so far, each as its own task's training left it."""
        parts = [self._stored[task].trained for task in range(stage + 1)]
        rows = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        return _head(self.about, self.directory, rows, self.classes_at(stage))

    def statistics(self, task: int) -> dict[str, Tensor]:
        """mean, count, and the spread of a task's classes (statistics.py); read anew."""
        tensors = _tensors(self.directory, self.tasks[task], CLASSES)
        return {name: tensor for name, tensor in tensors.items() if name not in ("prototype", "frozen")}

    def prototypes(self, stage: int) -> Tensor:
        """[C_stage, d]: class means under the first task's adapter."""
        return torch.cat([self._stored[task].prototype for task in range(stage + 1)])

    def frozen(self, stage: int) -> Tensor:
        """[C_stage, d]: class means under the backbone alone."""
        return torch.cat([self._stored[task].frozen for task in range(stage + 1)])


def read_bank(directory: str | Path) -> Bank:
    """Read and check a bank: `ModelError` if parts are missing or do not fit, `RunError` if a part is damaged."""
    place = Path(directory)
    about = read_manifest(place)
    if not about.tasks:
        raise ModelError(f"{place / MANIFEST}: it holds no tasks", COMPLETE)
    return Bank(place, about)


class BankWriter:
    """Adds tasks to a bank, one after the other; a task is complete when the manifest lists it.

    In a directory with a bank of the same settings, it continues after the last task whose files are complete.
    """

    def __init__(self, directory: Path, about: About) -> None:
        self.directory, self.about = directory, about
        self._first: Stored | None = None
        if (directory / MANIFEST).exists():
            found = read_manifest(directory)
            if replace(found, tasks=about.tasks) != about:
                raise RecipeError(f"{directory}: it holds a bank made with other settings", "choose another place")
            whole = [all((directory / file).is_file() for file in task.files) for task in found.tasks]
            self.about = replace(found, tasks=found.tasks[: [*whole, False].index(False)])

    def add(
        self,
        classes: Sequence[str],
        *,
        adapter: Mapping[str, Tensor],
        head: tuple[Tensor, Tensor],
        trained: tuple[Tensor, Tensor],
        statistics: Mapping[str, Tensor],
        prototype: Tensor,
        frozen: Tensor,
    ) -> list[str]:
        """Add a task and return the files written, the manifest last; a task that does not fit leaves no files.

        head: weight [C, d] and bias [C] of all classes so far; trained: those of `classes` alone. statistics: mean,
        count and the spread, as a task's file has them.
        """
        name = name_of(len(self.about.tasks))
        every = [*self.about.classes, *classes]
        written = {
            ADAPTER: as_file(
                _plain(adapter), {"kind": self.about.adapter.kind, "scale": str(self.about.adapter.scale)}
            ),
            HEAD: _head(self.about, self.directory, head, every).dump(),
            TRAINED: _head(self.about, self.directory, trained, classes).dump(),
            CLASSES: as_file(_plain({**statistics, "prototype": prototype, "frozen": frozen}), {}),
        }
        files = {pattern.format(name): raw for pattern, raw in written.items()}
        hashes = {file: hashlib.sha256(raw).hexdigest() for file, raw in files.items()}
        entry = TaskEntry(name=name, classes=tuple(classes), files=hashes)
        about = replace(self.about, tasks=(*self.about.tasks, entry))
        about.check(self.directory / MANIFEST)
        try:
            for file, raw in files.items():
                place = self.directory / file
                _make(place.parent)
                write_atomically(place, raw)
            if self._first is None and self.about.tasks:
                self._first = _read(self.directory, about, 0, None)
            last = _read(self.directory, about, len(self.about.tasks), self._first)
            about.write(self.directory)
        except BaseException:
            for file in files:
                (self.directory / file).unlink(missing_ok=True)
            raise
        self.about, self._first = about, self._first or last
        return [*files, MANIFEST]


def _read(directory: Path, about: About, task: int, first: Stored | None) -> Stored:
    """A task's files; `ModelError` where they do not fit the manifest or the first task's."""
    entry = about.tasks[task]
    tensors = {pattern: _tensors(directory, entry, pattern) for pattern in (ADAPTER, CLASSES)}
    hidden = _check_adapter(directory / ADAPTER.format(entry.name), tensors[ADAPTER], about, first)
    width = Pooling(about.features.pooling).width(hidden)
    every = tuple(name for one in about.tasks[: task + 1] for name in one.classes)
    head = _read_head(directory, entry, HEAD, about, every, width)
    trained = _read_head(directory, entry, TRAINED, about, entry.classes, width)
    found = tensors[CLASSES]
    _check_classes(directory / CLASSES.format(entry.name), found, about, entry, width)
    return Stored(tensors[ADAPTER], head, trained, found["prototype"].clone(), found["frozen"].clone())


def _check_adapter(file: Path, adapter: Mapping[str, Tensor], about: About, first: Stored | None) -> int:
    """The width of the model it belongs to; every block has four tensors that fit, and those of the first task."""
    blocks = sorted({name.removesuffix(f".{part}") for name in adapter for part in PARTS if name.endswith(f".{part}")})
    hidden = len(next((tensor for name, tensor in adapter.items() if name.endswith(".up.bias")), ()))
    if not (blocks and hidden):
        raise ModelError(f"{file}: not an adapter: it holds {', '.join(list(adapter)[:3]) or 'no tensors'}", COMPLETE)
    rank = about.adapter.bottleneck
    shapes = ((rank, hidden), (rank,), (hidden, rank), (hidden,))
    _fits(
        file, adapter, {f"{block}.{part}": shape for block in blocks for part, shape in zip(PARTS, shapes, strict=True)}
    )
    if first is not None:
        wanted = {name: tuple(tensor.shape) for name, tensor in first.adapter.items()}
        _fits(file, adapter, wanted, " as in task 01")
    return hidden


def _check_classes(file: Path, found: Mapping[str, Tensor], about: About, entry: TaskEntry, width: int) -> None:
    classes = len(entry.classes)
    centroids = found[about.statistics].shape[1:2] if about.statistics in found else ()
    spread = {"covariance": (width, width), "variance": (width,), "centroids": (*centroids, width)}[about.statistics]
    rows = dict.fromkeys(("mean", "prototype", "frozen"), (classes, width))
    wanted = {**rows, "count": (classes,), about.statistics: (classes, *spread)}
    if about.statistics == "centroids":
        wanted["within"] = wanted["centroids"]
    _fits(file, found, wanted)
    for name, count in zip(entry.classes, found["count"].tolist(), strict=True):
        if count < 1:
            raise ModelError(f"{file}: class '{name}' counts {count} items", "a class needs at least one")


def _fits(file: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]], why: str = "") -> None:
    """`ModelError` unless these are the tensors wanted; `RunError` where one is not finite."""
    for name in [*wanted, *found]:
        if name not in found or name not in wanted:
            raise ModelError(f"{file}: {name} {'is missing' if name in wanted else 'has no place'}{why}", COMPLETE)
        shape, dtype = list(found[name].shape), torch.int64 if name == "count" else torch.float32
        if shape != list(wanted[name]):
            raise ModelError(f"{file}: {name} has {shape}, not {list(wanted[name])}{why}", COMPLETE)
        if found[name].dtype != dtype:
            raise ModelError(f"{file}: {name} is {str(found[name].dtype)[6:]}, not {str(dtype)[6:]}", COMPLETE)
        if not found[name].isfinite().all():
            raise RunError(f"{file}: {name} holds a value that is not finite")


def _tensors(directory: Path, entry: TaskEntry, pattern: str) -> dict[str, Tensor]:
    """The tensors of a file, if its hash is that in the manifest."""
    _raw(directory, entry, pattern)
    return dict(sorted(read_tensors(read_header(directory / pattern.format(entry.name))).items()))


def _raw(directory: Path, entry: TaskEntry, pattern: str) -> bytes:
    """A file's bytes, if their hash is that in the manifest."""
    place = pattern.format(entry.name)
    file = directory / place
    try:
        raw = read_bytes(file)
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file, bank.json has it for task {entry.name}", COMPLETE) from None
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(raw).hexdigest() != entry.files[place]:
        raise damaged(file, "it is not the file that bank.json was written with")
    return raw


def _read_head(
    directory: Path, entry: TaskEntry, pattern: str, about: About, classes: Sequence[str], width: int
) -> Head:
    _raw(directory, entry, pattern)
    head = read_head(directory / pattern.format(entry.name))
    if head.labels != tuple(classes):
        what = f"it is for {_some(head.labels)}, bank.json has {_some(classes)}"
        raise ModelError(f"{head.file}: {what}", COMPLETE)
    if head.weight.shape[1] != width:
        raise ModelError(f"{head.file}: it takes {head.weight.shape[1]} features, the adapters give {width}", COMPLETE)
    if (head.pooling, head.max_length) != (Pooling(about.features.pooling), about.features.max_length):
        raise ModelError(f"{head.file}: its pooling or max_length is not that of bank.json", COMPLETE)
    return head


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''} ({len(names)} classes)"


def _head(about: About, file: Path, rows: tuple[Tensor, Tensor], classes: Sequence[str]) -> Head:
    return Head(file, *rows, tuple(classes), Pooling(about.features.pooling), about.features.max_length)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As the file takes them: float32 or whole numbers, on the CPU, without gradients."""
    mine = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in mine.items()}


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from None
