"""Tables that fit a width: of the forms that a table can take, the first that does.

As it is; with heads broken at words; without columns that can be missed; with prose wrapped; and last each record on
two lines, its name above the other cells, in several blocks where these are many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Column, Table

INDENT = 2  # of the cells below a record's name
PROSE = 24  # characters that a column of prose gets at least


def fitted(table: Table, console: Console, optional: Sequence[str] = ()) -> list[RenderableType]:
    """What to print for a table, no wider than the console unless one of its cells is.

    A column with a `ratio` holds prose, which may wrap; the columns named in `optional` go where there is no room.
    """
    if not table.columns or _fits(table, console):
        return [table]
    kept = [_measured(column, console) for column in table.columns]
    for name in ("", *optional):
        kept = [one for one in kept if str(one.column.header) != name or not name]
        slim = _drawn(table, kept, [one.least for one in kept])
        if _fits(slim, console):
            return [_drawn(table, kept, _widths(kept, console.width - _around(slim)))]
    room = console.width - _around(slim) - sum(one.least for one in kept if not one.column.ratio)
    shares = sum(one.column.ratio or 0 for one in kept)
    if shares and room >= PROSE * shares:
        widths = [room * one.column.ratio // shares if one.column.ratio else one.least for one in kept]
        return [_drawn(table, kept, widths)]
    return _records(table, kept, console)


class _Column(NamedTuple):
    """A column, its cells, how wide it is on one line, and at least: as its widest cell or the longest word above."""

    column: Column
    cells: list[RenderableType]
    wanted: int
    least: int


def _measured(column: Column, console: Console) -> _Column:
    head, *cells = (console.measure(cell, options=_unbounded(console)) for cell in (column.header, *column.cells))
    widest = max((cell.maximum for cell in cells), default=0)
    return _Column(column, list(column.cells), max(head.maximum, widest), max(head.minimum, widest))


def _widths(columns: Sequence[_Column], room: int) -> list[int]:
    """The columns' widths: heads stay on one line from the left on, as far as there is room."""
    room -= sum(one.least for one in columns)
    widths = []
    for one in columns:
        more = max(min(one.wanted - one.least, room), 0)
        widths.append(one.least + more)
        room -= more
    return widths


def _records(table: Table, columns: list[_Column], console: Console) -> list[RenderableType]:
    """Each record on lines of its own: its name, beside or above its other cells, and its prose."""
    first, *others = columns
    cells = [one for one in others if not one.column.ratio]
    prose = [[one] for one in others if one.column.ratio]
    between = table.padding[1] + table.padding[3]

    def fit(width: int, *parts: _Column) -> bool:
        return sum(one.least + between for one in parts) <= width

    if fit(console.width, first, *cells):
        groups = [[[first, *cells], *prose]]
    elif fit(console.width - INDENT, *cells):
        groups = [[[first], cells, *prose]]
    elif all(fit(console.width, first, one) for one in cells):
        groups = [[[first, *block]] for block in _blocks(cells, console.width - first.least - between, between)]
        groups[-1] += prose
    else:
        groups = [[[first], block] for block in _blocks(cells, console.width - INDENT, between)]
        groups[-1] += prose
    parts: list[RenderableType] = [table.title] if table.title else []
    for number, lines in enumerate(groups):
        parts += [""] if number else []
        parts += _lines(table, lines, console.width)
    return parts


def _lines(table: Table, lines: list[list[_Column]], width: int) -> list[RenderableType]:
    """Records of so many lines, those after the first indented, and heads likewise."""
    from rich.padding import Padding
    from rich.text import Text

    between = table.padding[1] + table.padding[3]
    rooms = [width - (INDENT if number else 0) - between * len(line) for number, line in enumerate(lines)]
    widths = [[min(one, room) for one in _widths(line, room)] for line, room in zip(lines, rooms, strict=True)]
    if len(lines) == 1:
        return [_drawn(table, lines[0], widths[0], bare=True, heads=table.show_header)]
    heads = [[[Text.styled(str(one.column.header), "bold")] for one in line] for line in lines]
    records = [
        [[[cell] for cell in cells] for cells in zip(*(one.cells for one in line), strict=True)] for line in lines
    ]
    parts: list[RenderableType] = []
    for record in ([heads] if table.show_header else []) + [list(one) for one in zip(*records, strict=True)]:
        for number, (line, sizes, row) in enumerate(zip(lines, widths, record, strict=True)):
            if any(str(cell) for (cell,) in row):
                columns = [one._replace(cells=cell) for one, cell in zip(line, row, strict=True)]
                parts.append(Padding(_drawn(table, columns, sizes, bare=True), (0, 0, 0, INDENT if number else 0)))
    return parts


def _blocks(columns: list[_Column], width: int, between: int) -> list[list[_Column]]:
    """The columns, as many at a time as fit."""
    blocks: list[list[_Column]] = []
    taken = 0
    for one in columns:
        taken += one.least + between
        if not blocks or taken > width:
            blocks.append([])
            taken = one.least + between
        blocks[-1].append(one)
    return blocks


def _drawn(
    table: Table, columns: Sequence[_Column], widths: Sequence[int], *, bare: bool = False, heads: bool = False
) -> Table:
    """A table of these columns in these widths, drawn as `table` is; `bare`: without its lines, and `heads` or none."""
    from rich.table import Table

    out = Table(
        *[
            replace(one.column, width=width, min_width=None, overflow="fold", _cells=[])
            for one, width in zip(columns, widths, strict=True)
        ],
        box=None if bare else table.box,
        padding=table.padding,
        header_style="bold" if bare else table.header_style,
        title=None if bare else table.title,
        title_justify=table.title_justify,
        show_header=heads if bare else table.show_header,
    )
    for row, cells in zip(table.rows, zip(*(one.cells for one in columns), strict=True), strict=False):
        out.add_row(*cells, end_section=row.end_section)
    return out


def _fits(table: Table, console: Console) -> bool:
    return console.measure(table, options=_unbounded(console)).maximum <= console.width


def _around(table: Table) -> int:
    """What stands between and beside the cells."""
    lines = len(table.columns) - 1 + 2 * table.show_edge if table.box else 0
    return len(table.columns) * (table.padding[1] + table.padding[3]) + lines


def _unbounded(console: Console) -> ConsoleOptions:
    return console.options.update(width=10_000)
