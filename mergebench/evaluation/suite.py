"""Suites: the tasks to measure, read strictly from YAML or a mapping.

    tasks:
      - name: tweets
        kind: text-classification
        data: cache/data/tweets.jsonl
        head: adapters/tweets/head.safetensors
        split: test

Parameters are chosen on the tasks of split `validation` and reported on those of split `test`: no item may be in both.
`load_suite` reads and checks everything that needs no model, including the tasks' data, so that errors appear before a
merge.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergebench.checkpoint.content import sha256_of
from mergebench.checkpoint.reference import looked_in
from mergebench.errors import RecipeError, did_you_mean
from mergebench.evaluation import scorers
from mergebench.evaluation import tasks as kinds
from mergebench.evaluation.scorer import Scorer
from mergebench.evaluation.task import Kind, Ready
from mergebench.recipe.declared import Declaring, Reader
from mergebench.recipe.positions import Loc, Places, show
from mergebench.recipe.yaml import find, parse, plain, text_of

SHAPE = "begin with tasks: and list them as '- name: …'"


@dataclass(frozen=True)
class Task:
    """One task of a suite, its data read."""

    name: str
    kind: Kind
    params: Any  # the kind's own dataclass
    ready: Ready

    @property
    def split(self) -> str:
        return str(self.params.split)


@dataclass(frozen=True)
class Suite:
    """Tasks in the order of the suite; made by `load_suite`. Names are unique within a split."""

    tasks: tuple[Task, ...]
    path: Path | None = None

    def only(self, split: str | None = None) -> Suite:
        """The tasks of one split; by default test if there are any, else validation."""
        found = {task.split for task in self.tasks}
        split = split or ("test" if "test" in found else "validation")
        if split not in found:
            hint = f"its tasks are for {found.pop()}; add tasks of the same names with split: {split}, on other items"
            raise RecipeError(f"{self.path or 'suite'}: no task has split: {split}", hint)
        return replace(self, tasks=tuple(task for task in self.tasks if task.split == split))

    def on(self, patches: Sequence[Path]) -> Suite:
        """The suite with the patches of the recipe's edits, which some tasks wait for."""
        ready = (one.on_patches(patches) if one.on_patches else one for one in (task.ready for task in self.tasks))
        return replace(self, tasks=tuple(replace(task, ready=one) for task, one in zip(self.tasks, ready, strict=True)))

    @property
    def items(self) -> int:
        """How many items one model is measured on."""
        return sum(task.ready.n for task in self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """The suite with a hash of every file read, ready for JSON."""
        tasks = [
            {
                "name": task.name,
                "kind": task.kind.name,
                "split": task.split,
                "limit": task.params.limit,
                "seed": task.params.seed,
                "n": task.ready.n,
                "sha256": {str(file): sha256_of(file) for file in task.ready.files},
            }
            for task in self.tasks
        ]
        return {"file": None if self.path is None else str(self.path), "tasks": tasks}


def load_suite(
    source: str | os.PathLike[str] | Mapping[str, Any],
    folders: Sequence[Path] = (),
    *,
    places: Places | None = None,
    at: Loc = (),
    edited: bool = False,
) -> Suite:
    """Read and check a suite: the path of a YAML file, or a mapping.

    Relative paths, the suite's own and those in it, are looked up in the working directory, then the
    suite file's folder, then `folders` (such as the recipe's). A suite written out in a recipe, or
    named there, is passed with the recipe's `places` and where it stands `at`, for messages; `edited`: the recipe has
    edits, whose patches its tasks may wait for (`Suite.on`).
    """
    if isinstance(source, Mapping):
        path, loc, places = None, at, places or Places({(): "suite"})
        data = plain(source, at, places)
    else:
        found = find(source, folders)
        if found is None:
            what = f"no such suite file: {os.fspath(source)}"
            hint = looked_in(os.fspath(source), folders)
            raise places.error(at, what, hint) if places else RecipeError(what, hint)
        path, loc, places = found, (), Places({(): str(found)})
        folders = [path.parent, *folders]
        data = parse(text_of(path), str(path), places)
    if not isinstance(data, dict):
        raise places.error(loc, f"a suite is a mapping, got {show(data)}", SHAPE)
    for key in data:
        if key != "tasks":
            raise places.error((*loc, key), "no such key", did_you_mean(key, ["tasks"]))
    entries = data.get("tasks")
    if not (isinstance(entries, list) and entries):
        what = "names no task" if entries in ([], None) else f"must be a list of tasks, got {show(entries)}"
        raise places.error((*loc, "tasks"), what, SHAPE)
    reader = _Reader(places, folders, edited)
    return Suite(tuple(reader.task(entry, (*loc, "tasks", i)) for i, entry in enumerate(entries)), path)


class _Reader(Reader):
    """Reads the entries of one suite; remembers the names it has met."""

    def __init__(self, places: Places, folders: Sequence[Path], edited: bool) -> None:
        super().__init__(places, folders)
        self.edited = edited
        self.names: set[tuple[str, str]] = set()
        self.items: dict[str, dict[str, tuple[str, str]]] = {"test": {}, "validation": {}}

    def task(self, entry: Any, loc: Loc) -> Task:
        if not isinstance(entry, dict):
            raise self.places.error(loc, f"must be a mapping, got {show(entry)}", SHAPE)
        given = {key: value for key, value in entry.items() if value is not None}
        name, kind_name = self.word(given, "name", loc), self.word(given, "kind", loc)
        kind = self.at((*loc, "kind"), lambda: kinds.get(kind_name))
        params = self.params(kind, {key: value for key, value in given.items() if key not in NAMES}, loc)
        if (name, params.split) in self.names:
            hint = "rename one, or give it the other split"
            raise self.places.error((*loc, "name"), f"a task before it is called '{name}' too", hint)
        self.names.add((name, params.split))
        task = Task(name, kind, params, kind(params))
        if task.ready.on_patches is not None and not self.edited:
            hint = "patch: FILE; it is known by itself only where a recipe edits what it measures"
            raise self.places.error((*loc, "patch"), f"missing, '{kind_name}' needs it", hint)
        self.keep_apart(task, loc)
        return task

    def keep_apart(self, task: Task, loc: Loc) -> None:
        """Refuse a task with items that are in a task of the other split."""
        other = "validation" if task.split == "test" else "test"
        both = [(where, *self.items[other][one]) for one, where in task.ready.items.items() if one in self.items[other]]
        if both:
            where, there, name = both[0]
            count = f"{len(both)} of its items are" if len(both) > 1 else "one of its items is"
            what = f"{count} also in the {other} data of '{name}': {where} and {there}"
            raise self.places.error(loc, what, "what is chosen on some items is reported on others")
        self.items[task.split].update({one: (where, task.name) for one, where in task.ready.items.items()})

    def scorer(self, value: Any, loc: Loc) -> Scorer:
        """`exact-match`, or a mapping with the scorer's name and its parameters: {regex: "…"}."""
        given = value if isinstance(value, dict) else {}
        names = scorers.names()
        name = next((key for key in given if key in names), value if isinstance(value, str) else None)
        if name is None:
            first = next((key for key in given if isinstance(key, str)), "")
            what = f"names no scorer, got {first or show(value)}"
            raise self.places.error(loc, what, did_you_mean(first, names))
        kind = self.at(loc, lambda: scorers.get(name))
        params = self.params(kind, given, loc)
        return self.at(loc, lambda: kind(params))

    def word(self, given: dict[str, Any], name: str, loc: Loc) -> str:
        if name not in given:
            raise self.places.error((*loc, name), "missing", f"{name}: {NAMES[name]}")
        value = given[name]
        if not (isinstance(value, str) and value.strip() and value.isprintable()):
            raise self.places.error((*loc, name), f"must be a word, got {show(value)}", "quote it if it is a number")
        return value

    def value(self, kind: Declaring, name: str, value: Any, loc: Loc, beside: Sequence[str] = ()) -> Any:
        if name in kind.parameters and kind.parameters[name].type is Scorer:
            return self.scorer(value, loc)
        return super().value(kind, name, value, loc, tuple(NAMES) if isinstance(kind, Kind) else ())


NAMES = {"name": "the task's name in tables", "kind": "such as text-classification"}
