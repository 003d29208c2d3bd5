"""The store of results: one JSON file for each model and task, so that nothing is measured twice.

A file's name is a hash of everything the result depends on: the bytes of the model, its config and tokenizer, the
task's keys and data, the sort of device, the versions of the libraries. Names and paths of models and files do not
count.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from mergebench.checkpoint.content import Contents, put
from mergebench.checkpoint.documents import read_json
from mergebench.evaluation.suite import Task
from mergebench.evaluation.task import Direction, Prediction, Score
from mergebench.networks.loadable import LoadableModel

DEFAULT = Path("results")
READING = 2  # one more where the same files and versions come to be measured otherwise


class Stored(TypedDict):
    """What is read of a result."""

    value: float
    stderr: float | None
    n: int
    predictions: dict[str, tuple[str, float]]
    metric: str
    direction: Direction
    seconds: float


@dataclass
class Store:
    """A folder of results, created with the first result."""

    folder: Path = DEFAULT

    def key(self, content: str | None, task: Task, device: str, versions: Mapping[str, Any]) -> str | None:
        """The key of a result for a model with that content; None if its content is not known."""
        if content is None:
            return None
        plain = {name: value for name, value in vars(task.params).items() if not isinstance(value, Path)}
        made_of = {
            "model": content,
            "kind": task.kind.name,
            "keys": {name: value for name, value in plain.items() if name != "split"},
            "files": [self._contents.of_file(file) for file in task.ready.files],
            "device": device,
            "reading": READING,
            "versions": {**versions, **task.ready.versions},
        }
        return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:40]

    def find(self, key: str | None) -> tuple[Score, float] | None:
        """A stored result and the seconds it took; None if there is none, or its file is damaged."""
        if key is None:
            return None
        path = self.folder / f"{key}.json"
        try:
            found = read_json(path, Stored)
        except (OSError, ValueError):
            return None
        predictions = {item: Prediction(out, float(score)) for item, (out, score) in found["predictions"].items()}
        if len(predictions) != found["n"]:
            return None
        with suppress(OSError):  # a folder that only others may write to
            os.utime(path)  # used now
        stderr = None if found["stderr"] is None else float(found["stderr"])
        score = Score(float(found["value"]), stderr, found["n"], predictions, found["metric"], found["direction"])
        return score, float(found["seconds"])

    def keep(self, key: str | None, score: Score, seconds: float, about: Mapping[str, Any]) -> None:
        """Write a result atomically. about: its origin, which `kept` shows."""
        if key is None:
            return
        put(self.folder, f"{key}.json", {**about, **vars(score), "seconds": seconds})

    def content(self, model: LoadableModel) -> str | None:
        """A hash of every file that determines what a model computes; None for a model that is not made of files."""
        return self._contents.of_model(model)

    @cached_property
    def _contents(self) -> Contents:
        return Contents(self.folder)
