"""Labelled texts or images: read them from a task's data, and score a model's answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mergebench.errors import RunError, did_you_mean
from mergebench.evaluation.images import Images, check_image
from mergebench.evaluation.task import Item, Prediction, Score, accuracy, asked
from mergebench.networks.features import Inputs, Texts
from mergebench.networks.items import Row, contents, read_rows
from mergebench.plugins import need


@dataclass(frozen=True)
class Labelled:
    """Items with their labels, ready for an encoder."""

    rows: Sequence[Row]
    labels: Sequence[str]  # none if no column was requested
    inputs: Inputs
    items: Mapping[str, str]  # the place of each item, by its content
    asked: Mapping[str, Item]  # each text or image's path, with its label, by id
    versions: Mapping[str, str] = field(default_factory=dict)  # of images and the library that reads them

    def known(self, labels: Collection[str], whose: object) -> None:
        """`RunError` at the first item whose label is not in `labels`."""
        for row, label in zip(self.rows, self.labels, strict=True):
            if label not in labels:
                close = did_you_mean(label, labels)
                raise RunError(f"{row.where}: label '{label:.60}' is none of the labels of {whose}", close)

    def score(self, answers: Sequence[str]) -> Score:
        """The accuracy of one answer to each item."""
        graded = zip(self.rows, answers, self.labels, strict=True)
        return accuracy({row.id: Prediction(answer, float(answer == label)) for row, answer, label in graded})


def read_texts(
    file: Path,
    id: str,
    text: str,
    label: str | None,
    max_length: int,
    limit: int | None = None,
    seed: int | None = None,
) -> Labelled:
    """Rows with these columns; the texts are cut to `max_length` tokens."""
    rows = read_rows(file, id, _columns(text, label), limit, seed)
    texts = [_word(row, row.values[0], text) for row in rows]
    labels = _labels(rows, label)
    return Labelled(rows, labels, Texts(texts, max_length), contents(rows), asked(rows, texts, labels))


def read_images(
    file: Path, id: str, image: str, label: str | None, limit: int | None = None, seed: int | None = None
) -> Labelled:
    """Rows with these columns; an image is a path relative to the data file's folder, and is identified by its
    bytes."""
    pillow = need("pillow", "images")
    rows = read_rows(file, id, _columns(image, label), limit, seed)
    files = [file.parent / _word(row, row.values[0], image) for row in rows]
    labels = _labels(rows, label)
    hashes = [check_image(path, row.where) for path, row in zip(files, rows, strict=True)]
    seen = [row._replace(values=(one, *row.values[1:])) for row, one in zip(rows, hashes, strict=True)]
    images = Images(files, hashes)
    paths = [str(row.values[0]) for row in rows]
    return Labelled(
        rows, labels, images, contents(seen), asked(rows, paths, labels), {"pillow": pillow, "images": images.key}
    )


def _columns(content: str, label: str | None) -> tuple[str, ...]:
    return (content,) if label is None else (content, label)


def _labels(rows: Sequence[Row], column: str | None) -> list[str]:
    """Labels as words; whole numbers count as words."""
    if column is None:
        return []
    values = (row.values[1] for row in rows)
    return [_word(row, str(one) if type(one) is int else one, column) for row, one in zip(rows, values, strict=True)]


def _word(row: Row, value: object, column: str) -> str:
    if not isinstance(value, str):
        raise RunError(f"{row.where}: {column} must be text, got {value!r:.60}")
    return value
