"""Formatting for all views of results: numbers, tables as text, lines of Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mergebench.errors import shown
from mergebench.evaluation.tables.fitted import fitted

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

NONE = "–"
WIDEST, MEASURE = 10_000, 72  # columns: more than any table has; what a line of text takes at least
SHARES = ("accuracy",)  # metrics from 0 to 1, shown in percent


def number(value: float, metric: str) -> str:
    """A value as tables show it; what rounds to zero has no sign."""
    return f"{100 * value:z.1f}" if metric in SHARES else f"{value:z.4g}"


def render(table: Table, legend: str, *, width: int | None = None, styled: bool = False) -> list[str]:
    """Lines of a table and the text below it, at most `width` columns wide (None: as wide as it needs).

    `styled`: with a terminal's codes for bold.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(
        width=width or WIDEST, force_terminal=styled, color_system="standard" if styled else None, legacy_windows=False
    )
    with console.capture() as capture:
        for part in fitted(table, console):
            console.print(part)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    across = min(width or WIDEST, max(MEASURE, *(Text.from_ansi(line).cell_len for line in lines)))
    return lines + textwrap.wrap(legend, across - 1, initial_indent=" ", subsequent_indent=" ")


def short_names(names: Iterable[str]) -> dict[str, str]:
    """The shortest last parts of each name that are unique.

    `runs/a/tweets` and `base+b/nouns` become `tweets` and `nouns`; text in brackets is kept whole.
    """
    names = list(dict.fromkeys(names))
    split = {name: re.split(r"[/+](?![^(]*\))", name) for name in names}
    parts = {name: [part for part in split[name] if part not in ("", ".")] or [name] for name in names}
    longest = max(map(len, parts.values()), default=1)
    short = {name: name for name in names}
    left = set(names)
    for length in range(1, longest + 1):
        tails = {name: "/".join(parts[name][-length:]) for name in names}
        for name in list(left):
            if list(tails.values()).count(tails[name]) == 1:
                short[name] = tails[name]
                left.discard(name)
    return short


def markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def literal(text: str, style: str = "") -> Text:
    """A cell of a table for the terminal: names come from files."""
    from rich.text import Text

    return Text(shown(text), style)
