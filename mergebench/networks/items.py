"""Read a task's items from JSON lines or a JSON list, strictly: every message names the file and the place in it."""

from __future__ import annotations

import codecs
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mergebench.checkpoint.documents import NotJSON, open_file, parse_json
from mergebench.errors import RunError

SHAPE = "write one JSON object a line, or one list of them"
COLUMN_HINT = "name the columns in the suite's task, such as text: COLUMN"
ID_HINT = "flips between models are counted item by item, so each needs an id of its own"


class Row(NamedTuple):
    """One item: its place, its id, and the requested columns."""

    where: str  # file:line
    id: str
    values: tuple[Any, ...]


def read_rows(
    file: Path, id_column: str, columns: Sequence[str], limit: int | None = None, seed: int | None = None
) -> list[Row]:
    """The first `limit` rows of a file; with a seed, `limit` random rows in the file's order.

    `RunError` if a line is broken or an id appears twice.
    """
    rows: list[Row] = []
    places: dict[str, str] = {}
    for where, record in islice(records(file), limit if seed is None else None):
        item = word(record, id_column, where)
        if item in places:
            raise RunError(f"{where}: id '{item}' stands in {places[item]} already", ID_HINT)
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
    """Place and JSON object of every item: `file:line` of lines that are not blank, `file: item 3` of a list.

    Lines end at \\n alone, as in JSON.
    """
    try:
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
