"""Read a task's items from JSON lines, a JSON list or CSV, strictly: every message names the file and the place in it.

An item has an id in its own column, or is known by what it says.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mergebench.checkpoint.documents import NotJSON, open_file, parse_json
from mergebench.errors import RunError, counted

SHAPE = "write one JSON object a line, one list of them, or a table with heads in a file .csv"
CSV_SHAPE = "a first line with the columns' names, then one line per item, with commas between"
COLUMN_HINT = "name the columns in the suite's task, such as text: COLUMN"
ID_HINT = "flips between models are counted item by item, so each needs an id of its own"
ID = "id"  # the column that need not be there


class Row(NamedTuple):
    """One item: its place, its id, and the requested columns."""

    where: str  # file:line
    id: str
    values: tuple[Any, ...]


def read_rows(
    file: Path, id_column: str, columns: Sequence[str], limit: int | None = None, seed: int | None = None
) -> list[Row]:
    """The first `limit` rows of a file; with a seed, `limit` random rows in the file's order.

    Where no row has a column `id`, and no other column is named for it, an item's id is a hash of the requested
    columns, with #2, #3, … where they come again: the same item has the same id in another file too.

    `RunError` if a line is broken or an id appears twice.
    """
    rows: list[Row] = []
    places: dict[str, str] = {}
    seen: Counter[str] = Counter()
    nameless = False
    for where, record in islice(records(file), limit if seed is None else None):
        if not rows:
            nameless = id_column == ID and ID not in record
        if nameless:
            if ID in record:
                raise RunError(f"{where}: it has an id, the rows before it have none", ID_HINT)
            values = tuple(column(record, name, where) for name in columns)
            item = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
            seen[item] += 1
            rows.append(Row(where, item if seen[item] == 1 else f"{item}#{seen[item]}", values))
            continue
        item = word(record, id_column, where)
        if item in places:
            raise RunError(f"{where}: id '{item}' is in {places[item]} already", ID_HINT)
        places[item] = where.rpartition("/")[2]
        rows.append(Row(where, item, tuple(column(record, name, where) for name in columns)))
    if not rows:
        raise RunError(f"{file}: it holds no items", SHAPE)
    return some(rows, limit, seed)


def some(rows: list[Row], limit: int | None, seed: int | None) -> list[Row]:
    """The first `limit` of these rows; with a seed, `limit` random rows in their order."""
    if seed is None or limit is None or limit >= len(rows):
        return rows[:limit]
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def contents(rows: Iterable[Row]) -> dict[str, str]:
    """The place of each item, by a hash of its id and content, which finds it again in another file."""
    return {hashlib.sha256(json.dumps(row[1:], sort_keys=True).encode()).hexdigest(): row.where for row in rows}


def texts(rows: Iterable[Row], name: str) -> list[str]:
    """The first requested column, called `name`; `RunError` if it is no text, or blank."""
    found = []
    for row in rows:
        if not (isinstance(row.values[0], str) and row.values[0].strip()):
            raise RunError(f"{row.where}: {name} must be text, got {row.values[0]!r:.60}")
        found.append(row.values[0])
    return found


def column(record: dict[str, Any], name: str, where: str, hint: str = COLUMN_HINT) -> Any:
    """One column of a row; `RunError` if it is missing."""
    if name not in record:
        raise RunError(f"{where}: no column '{name}', it has {', '.join(record) or 'none'}", hint)
    return record[name]


def word(record: dict[str, Any], name: str, where: str) -> str:
    """A column with a name or id: text, or a whole number taken as text."""
    value = column(record, name, where)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise RunError(f"{where}: {name} must be text or a whole number, got {json.dumps(value)[:60]}")
    return str(value)


def records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and columns of every item: `file:line` of lines that are not blank, `file: item 3` of a list.

    A file whose name ends in .csv is a table with a line of heads, whose cells are texts. In others, lines end at \\n
    alone, as in JSON.
    """
    try:
        if file.suffix.lower() == ".csv":
            yield from _table(file)
            return
        with open_file(file) as stream:
            listed = stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            stream.seek(0)
            if listed:
                for number, item in enumerate(_parse(stream.read(), str(file)), 1):
                    yield f"{file}: item {number}", _object(item, f"{file}: item {number}")
            else:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield f"{file}:{number}", _object(_parse(line, f"{file}:{number}"), f"{file}:{number}")
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}") from None


def _table(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of comma-separated values; a row that is longer or shorter than the heads is an error."""
    csv.field_size_limit(sys.maxsize)  # of all programs' texts, 131,072 letters by default
    with open_file(file) as stream:
        reader = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
        where, heads = f"{file}:1", None
        try:
            for cells in reader:
                if not any(cells):
                    where = f"{file}:{reader.line_num + 1}"
                    continue
                if heads is None:
                    heads = [head.strip() for head in cells]
                    if "" in heads or len(set(heads)) < len(heads):
                        raise RunError(f"{where}: two columns have one name, or one has none", CSV_SHAPE)
                elif len(cells) != len(heads):
                    count = f"{counted(len(cells), 'cell')}, the heads are {len(heads)}"
                    raise RunError(f"{where}: {count}", "put quotes around a text that has commas or line ends")
                else:
                    yield where, dict(zip(heads, cells, strict=True))
                where = f"{file}:{reader.line_num + 1}"
        except UnicodeDecodeError:
            raise RunError(f"{file}: not UTF-8 text", CSV_SHAPE) from None
        except csv.Error as error:
            raise RunError(f"{where}: not valid CSV: {error}", CSV_SHAPE) from None


def _parse(text: bytes, where: str) -> Any:
    try:
        return parse_json(text.removeprefix(codecs.BOM_UTF8), Any)
    except NotJSON as error:
        line = f"{error.line}:" if error.line > 1 else ""
        place = f"{where}:{line}{error.column}" if error.column else where
        raise RunError(f"{place}: not valid JSON: {error.reason}", SHAPE) from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RunError(f"{where}: not a JSON object", SHAPE)
    return value
