"""The elements of a page. The template knows only these, not their content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mergebench.evaluation.page.figures import Drawn, Figure
from mergebench.evaluation.tables.results import Cell


class Text(NamedTuple):
    """A paragraph."""

    text: str
    kind: str = "text"


class Gallery(NamedTuple):
    """Plots beside each other where there is room, and how to read them."""

    figures: Sequence[Figure]
    caption: str
    drawn: Sequence[Drawn] = ()
    kind: str = "gallery"


class Table(NamedTuple):
    """Rows under heads; each row begins with what it is about. `words`: columns of text, from the left."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str
    words: int = 1
    kind: str = "table"


class Facts(NamedTuple):
    """Terms and their values."""

    pairs: Sequence[tuple[str, str]]
    kind: str = "facts"


class Verbatim(NamedTuple):
    """Text as it was written."""

    text: str
    kind: str = "verbatim"


class Picture(NamedTuple):
    """A PNG, in base64, and its description in words."""

    data: str
    alt: str
    kind: str = "picture"


class Fold(NamedTuple):
    """Details that the reader can open."""

    summary: str
    parts: Sequence[Part]
    kind: str = "fold"


Part = Text | Gallery | Table | Facts | Verbatim | Picture | Fold


class Section(NamedTuple):
    """A titled piece of the page."""

    title: str
    parts: Sequence[Part]


def cells(*texts: str) -> list[Cell]:
    """Cells of plain text."""
    return [Cell(text) for text in texts]
