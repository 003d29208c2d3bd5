"""Reading a task's items from JSON lines, strictly: every message names file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergebench.errors import RunError

ID_HINT = "flips between models are counted item by item, so each needs an id of its own"


class Row(NamedTuple):
    """One item: where it stands, its id, and the columns asked for."""

    where: str  # file:line
    id: str
    values: tuple[Any, ...]


def read_rows(file: Path, id_column: str, columns: Sequence[str], limit: int | None) -> list[Row]:
    """The first `limit` rows of a JSON-lines file; `RunError` where a line is broken or an id stands twice."""
    rows: list[Row] = []
    lines: dict[str, int] = {}
    for number, record in _records(file):
        if len(rows) == limit:
            break
        where = f"{file}:{number}"
        item = word(record, id_column, where)
        if item in lines:
            raise RunError(f"{where}: id '{item}' stands in line {lines[item]} already", ID_HINT)
        lines[item] = number
        rows.append(Row(where, item, tuple(column(record, name, where) for name in columns)))
    if not rows:
        raise RunError(f"{file}: it holds no items", "write one JSON object a line")
    return rows


def column(record: dict[str, Any], name: str, where: str) -> Any:
    """One column of a row; `RunError` where there is none."""
    if name not in record:
        raise RunError(
            f"{where}: no column '{name}', it has {', '.join(record) or 'none'}",
            "name the columns in the suite's task, such as text: COLUMN",
        )
    return record[name]


def word(record: dict[str, Any], name: str, where: str) -> str:
    """A column that names something: text, or a whole number taken as text."""
    value = column(record, name, where)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise RunError(f"{where}: {name} must be text or a whole number, got {json.dumps(value)[:60]}")
    return str(value)


def _records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and JSON object of every line that is not blank. Lines end at \\n alone, as in JSON."""
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, _parse(line, f"{file}:{number}")
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}") from None


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise RunError(f"{where}: not UTF-8 text", "save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise RunError(f"{where}:{error.colno}: not valid JSON: {error.msg}", "write one JSON object a line") from None
    except (ValueError, RecursionError):
        raise RunError(f"{where}: not valid JSON") from None
    if not isinstance(record, dict):
        raise RunError(f"{where}: not a JSON object", "write one JSON object a line")
    return record
