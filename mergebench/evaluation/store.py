"""What was measured, kept: one JSON file for each model and task, so that nothing is measured twice.

A file's name is a hash of everything the result depends on: the bytes of the model, its config and
tokenizer, the task's keys and data, the sort of device, the versions of the libraries. Names and places
of models and files do not count.
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
from typing import Any, get_args

from mergebench.checkpoint import Model
from mergebench.errors import RunError
from mergebench.evaluation.suite import Task, sha256_of
from mergebench.evaluation.task import Direction, Prediction, Score
from mergebench.running.model import LoadableModel
from mergebench.running.network import TOKENIZER_FILES

DEFAULT = Path("results")
BESIDE = ("config.json", "generation_config.json", "*processor_config.json", *TOKENIZER_FILES)


@dataclass
class Store:
    """A folder of results; made when the first one is kept."""

    folder: Path = DEFAULT

    def key(self, content: str | None, task: Task, device: str, versions: Mapping[str, Any]) -> str | None:
        """What the result of a model with that content is kept under; None where its content is not known."""
        if content is None:
            return None
        plain = {name: value for name, value in vars(task.params).items() if not isinstance(value, Path)}
        made_of = {
            "model": content,
            "kind": task.kind.name,
            "keys": {name: value for name, value in plain.items() if name != "split"},
            "files": [self._sha256(file) for file in task.ready.files],
            "device": device,
            "versions": {**versions, **task.ready.versions},
        }
        return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:40]

    def find(self, key: str | None) -> tuple[Score, float] | None:
        """A result kept before and the seconds it took; None where there is none, or its file is damaged."""
        if key is None:
            return None
        try:
            found = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            predictions = {
                item: Prediction(str(out), float(score)) for item, (out, score) in found["predictions"].items()
            }
            stderr = None if found["stderr"] is None else float(found["stderr"])
            direction: Direction = found["direction"]
            if direction not in get_args(Direction) or len(predictions) != found["n"]:
                return None
            score = Score(float(found["value"]), stderr, found["n"], predictions, str(found["metric"]), direction)
            return score, float(found["seconds"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def keep(self, key: str | None, score: Score, seconds: float, about: Mapping[str, Any]) -> None:
        """Put a result in its place, at once. about: for people; nothing reads it."""
        if key is None:
            return
        self._put(f"{key}.json", {**about, **vars(score), "seconds": seconds})

    def content(self, model: LoadableModel) -> str | None:
        """A hash of every file that says what a model computes; None for a model that is not made of files."""
        if not isinstance(model, Model):
            return None
        files = [header.file for header in model.files()]
        if model.directory is not None:
            files += sorted({file for pattern in BESIDE for file in model.side_directory.glob(pattern)})
        if model.adapter is not None:
            files += sorted(model.adapter.glob("*config.json"))
        listed = [(file.name, self._sha256(file)) for file in files]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    @cached_property
    def _hashes(self) -> dict[str, Any]:
        """Hashes of files by place, size and time: 2 GB are read in a second, but not for every task."""
        with suppress(OSError, ValueError):
            found = json.loads((self.folder / "hashes.json").read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        return {}

    def _sha256(self, file: Path) -> str:
        status, place = file.stat(), str(file.resolve())
        stamp = [status.st_size, status.st_mtime_ns]
        known = self._hashes.get(place)
        if not (isinstance(known, list) and known[:2] == stamp and len(known) == 3):
            self._hashes[place] = known = [*stamp, sha256_of(file)]
            self._put("hashes.json", self._hashes)
        return str(known[2])

    def _put(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a file at once; several programs may keep their results in one folder."""
        text = json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f".{name}.{os.getpid()}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(self.folder / name)
        except OSError as error:
            what = f"{self.folder}: no result can be kept there: {error.strerror}"
            raise RunError(what, "choose another folder: --results DIR") from None
