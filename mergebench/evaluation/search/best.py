"""The winner as a recipe that stands on its own, wherever it is written."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergebench.checkpoint.files import write_atomically
from mergebench.evaluation import tasks as kinds
from mergebench.recipe import Recipe
from mergebench.recipe.open import folders


def write_recipe(recipe: Recipe, file: Path, comment: str) -> None:
    """Write a recipe with every default, and paths that lead from the file to what the recipe names."""
    from ruamel.yaml import YAML

    places = folders(recipe)
    document = _moved(recipe.to_dict(), places, Path(os.path.realpath(file.parent)))
    yaml, text = YAML(), io.StringIO()
    yaml.width = 4096
    yaml.dump(document, text)
    write_atomically(file, "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines()) + text.getvalue())


def _moved(value: Any, places: Sequence[Path], to: Path, key: str = "") -> Any:
    """A part of a recipe with its references and paths as they are written in the directory `to`."""
    if key == "suite":
        return _suite(value, places, to)
    if key in ("merge_method", "baselines") and isinstance(value, str):
        file, colon, name = value.rpartition(":")  # of one's own, FILE.py:NAME
        return f"{_path(file, places, to)}:{name}" if colon else value
    if isinstance(value, Mapping):
        return {name: one if name == "parameters" else _moved(one, places, to, name) for name, one in value.items()}
    if isinstance(value, list):
        return [_moved(one, places, to, key) for one in value]
    named = key in ("base_model", "model", "task_vector", "probe", "statistics")
    named = named or (key == "source" and value not in ("base", "union"))
    return _reference(value, places, to) if named and isinstance(value, str) else value


def _reference(text: str, places: Sequence[Path], to: Path) -> str:
    """A model: a path, a path with an adapter, or a name on the hub, which stays."""
    if _found(text, places) is None:
        left, plus, right = text.rpartition("+")
        if plus and left and right:
            return f"{_reference(left, places, to)}+{_reference(right, places, to)}"
    return _path(text, places, to)


def _suite(value: Any, places: Sequence[Path], to: Path) -> Any:
    if isinstance(value, str):
        return _path(value, places, to)
    tasks = []
    for task in value["tasks"]:
        known = kinds.get(task["kind"]).parameters
        files = {name for name in task if name in known and known[name].type is Path}
        paths = {name: _path(task[name], places, to) for name in files}
        tasks.append({**task, **paths})
    return {**value, "tasks": tasks}


def _path(text: str, places: Sequence[Path], to: Path) -> str:
    found = _found(text, places)
    if found is None or Path(text).is_absolute() or text.startswith("~"):
        return text
    return os.path.relpath(os.path.realpath(found.parent) + os.sep + found.name, to)


def _found(text: str, places: Sequence[Path]) -> Path | None:
    try:
        return next((place for place in [Path(text), *(one / text for one in places)] if place.exists()), None)
    except OSError:
        return None
