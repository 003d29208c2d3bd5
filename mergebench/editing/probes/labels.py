"""Labelled texts: one rule, for all commands, of which labels are desired and which undesired."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergebench.errors import RecipeError, RunError, did_you_mean
from mergebench.networks.items import SHAPE, column, records

UNDESIRED = ("1", "true", "undesired")  # without `--undesired`


class Labelled(NamedTuple):
    """Texts in the order of their file, each once."""

    texts: list[str]
    undesired: list[bool]
    classes: tuple[str, str]  # names of the desired and the undesired class
    places: dict[str, str]  # the place of each text in the file


def read_labelled(file: Path, text: str = "text", label: str = "label", undesired: str | None = None) -> Labelled:
    """JSON lines or a list, with these columns; `undesired`: the label of the undesired class; all other labels are
    desired.

    `RunError` if a row is broken, or a text has two labels; `RecipeError` if a class has no text.
    """
    labels: dict[str, str] = {}
    places: dict[str, str] = {}
    for where, record in records(file):
        one = column(record, text, where, "name it: --text COLUMN")
        if not isinstance(one, str) or not one.strip():
            raise RunError(f"{where}: {text} must be text, got {one!r:.60}")
        given = word(column(record, label, where, "name it: --label COLUMN"), where, label)
        if labels.setdefault(one, given) != given:
            there = places[one].rpartition("/")[2]
            raise RunError(f"{where}: the same text has another label in {there}", "keep one of the two")
        places.setdefault(one, where)
    if not labels:
        raise RunError(f"{file}: it holds no items", SHAPE)
    bad = which(file, list(labels.values()), undesired)
    good = sorted({one for one in labels.values() if one not in bad})
    classes = good[0] if len(good) == 1 else f"not {bad[0]}", bad[0]
    return Labelled(list(labels), [one in bad for one in labels.values()], classes, places)


def word(value: Any, where: str, column: str) -> str:
    """A label as a word: true and false, and whole numbers, as JSON writes them."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, (str, int)) or value == "":
        raise RunError(f"{where}: {column} must be a word, a whole number, true or false, got {value!r:.60}")
    return str(value)


def which(file: Path, labels: Sequence[str], undesired: str | None) -> list[str]:
    """The labels of the undesired class; `RecipeError` if either class has no text."""
    known = sorted(set(labels))
    found = [one for one in known if (one in UNDESIRED if undesired is None else one == undesired)]
    some = ", ".join(f"'{one}'" for one in known[:5]) + ", …" * (len(known) > 5)
    if not found and undesired is not None:
        raise RecipeError(f"{file}: no label is '{undesired}'", did_you_mean(undesired, known))
    if not found and len(known) > 1:
        raise RecipeError(f"{file}: its labels are {some}: which is undesired?", "--undesired LABEL")
    if len(found) in (0, len(known)):
        raise RecipeError(f"{file}: all texts are of one class, {some}", "a probe tells two classes apart")
    return found
