"""The elements of a page. The template knows only these, not their content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from mergebench.evaluation.page.figures import Drawn, Figure
from mergebench.evaluation.tables.sheet import Cell, Sheet


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
    """Rows under heads; each row begins with what it is about. `words`: columns of text, from the left; grouped: rows
    that begin alike say it once."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str
    words: int = 1
    grouped: bool = False
    kind: str = "table"

    @property
    def spans(self) -> list[int]:
        """Over how many rows the first cell of each stands; 0 where it is the one above."""
        firsts = [row[0].text for row in self.rows]
        spans = [1] * len(firsts)
        for place in range(len(firsts) - 1, 0, -1):
            if self.grouped and firsts[place] == firsts[place - 1]:
                spans[place - 1], spans[place] = spans[place - 1] + spans[place], 0
        return spans

    @property
    def sheet(self) -> Sheet:
        """The same for other programs: what has an error makes two columns of CSV."""
        errors = {place for row in self.rows for place, cell in enumerate(row) if " ± " in cell.text}
        rows = [
            [replace(cell, parts=tuple(cell.text.split(" ± "))) if place in errors else cell
             for place, cell in enumerate(row)]
            for row in self.rows
        ]  # fmt: skip
        parts: dict[int, tuple[str, ...]] = {place: (self.heads[place], f"{self.heads[place]} ±") for place in errors}
        return Sheet(self.heads, rows, self.caption, self.words, parts=parts)

    @property
    def starred(self) -> bool:
        """Whether a cell is marked as the best."""
        return any(cell.best for row in self.rows for cell in row)


class Points(NamedTuple):
    """A list."""

    items: Sequence[str]
    kind: str = "points"


class Facts(NamedTuple):
    """Terms and their values; a value may have lines."""

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


Part = Text | Points | Gallery | Table | Facts | Verbatim | Picture | Fold


class Section(NamedTuple):
    """A titled piece of the page."""

    title: str
    parts: Sequence[Part]


def lasted(seconds: object) -> str:
    """`6.4 s`, `12 min`, `3.5 h`."""
    if not isinstance(seconds, (int, float)):
        return "an unknown time"
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def cells(*texts: str) -> list[Cell]:
    """Cells of plain text."""
    return [Cell(text) for text in texts]
