"""The one reader of files that another program may have written: regular files, UTF-8, JSON of the expected types.

Everything raises `OSError` where a file cannot be read and `ValueError` where its content is not what it must be, for
callers that know what the file is for; `document` says it for the others.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import types
from collections.abc import Callable, Iterator
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from mergebench.errors import MergebenchError, RunError

Object = dict[str, Any]
DEEPEST = 100  # levels of a document: deeper ones end the recursion of whatever walks over them
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_DIGITS = 300  # of a whole number that float64 surely holds
_ZEROS = str.maketrans("123456789", "000000000")
_SORTS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("text", lambda value: isinstance(value, str)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: type(value) is int),
    float: ("a finite number", lambda value: type(value) in (int, float) and math.isfinite(value)),
    types.NoneType: ("null", lambda value: value is None),
    dict: ("a mapping", lambda value: isinstance(value, dict)),
    list: ("a list", lambda value: isinstance(value, list)),
    tuple: ("a list", lambda value: isinstance(value, list)),
}


class NotJSON(ValueError):
    """A text that is not JSON: what is wrong, and the line and column, from 1, if it is at one."""

    def __init__(self, reason: str, line: int = 0, column: int = 0) -> None:
        place = f"line {line}, column {column}: " if column else ""
        super().__init__(f"not readable as JSON: {place}{reason}")
        self.reason, self.line, self.column = reason, line, column


def descriptor(file: Path) -> int:
    """Open a file to be read. Pipes and devices are refused, because they may never end."""
    if (fault := fault_of(file)) is not None:
        raise OSError(errno.EINVAL, f"{fault}: give it another name", os.fspath(file))
    number = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for a writer
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(file))
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(file))
    return number


def fault_of(path: Path) -> str | None:
    """Why a path is none that files here have: file names may be any bytes, and a caller's text have any characters."""
    try:
        return "its path has a NUL character" if b"\0" in os.fspath(path).encode() else None
    except UnicodeEncodeError:
        return "its path is not UTF-8"


def open_file(file: Path) -> BufferedReader:
    """The same as a stream of bytes."""
    return open(descriptor(file), "rb")


def read_bytes(file: Path) -> bytes:
    """All of a file."""
    with open_file(file) as stream:
        return stream.read()


def read_json(file: Path, kind: Any = Object) -> Any:
    """The document in a file, of this type: a `TypedDict`, or one of JSON's."""
    return parse_json(read_bytes(file), kind)


def document(file: Path, kind: Any = Object, hint: str | None = None, missing: MergebenchError | None = None) -> Any:
    """The same, with a `RunError` that names the file and the place in it; missing: the error if there is no file."""
    try:
        return read_json(file, kind)
    except OSError as error:
        if missing is not None and isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise missing from None
        raise RunError(f"{file}: cannot be read: {error.strerror}", hint) from None
    except ValueError as error:
        raise RunError(f"{file}: {error}", hint) from None


def parse_json(text: str | bytes, kind: Any = Object) -> Any:
    """The value of a JSON text, of this type. NaN and Infinity pass only where the type leaves them open."""
    try:
        text = text if isinstance(text, str) else text.decode()
        long = "0" * _DIGITS in text.translate(_ZEROS)
        value = json.loads(text, parse_int=_whole if long else None)
        if not _is_shallow(text):
            _check_depth(value)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise NotJSON(error.msg, error.lineno, error.colno) from None
    except UnicodeDecodeError:
        raise NotJSON("not UTF-8 text") from None
    except UnicodeEncodeError as error:
        raise NotJSON(f"{error.object[error.start]!a} is half of a character") from None
    except RecursionError:
        raise NotJSON("nested too deep") from None
    fault = complaint(value, kind)
    if fault is not None:
        raise ValueError(fault)
    return value


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS and math.isinf(float(digits)):
        raise NotJSON("a number is too large")
    return int(digits)


def _is_shallow(text: str) -> bool:
    """Whether the brackets of a JSON text close within few levels; False too where some stand in its words."""
    left = text.encode().translate(None, _NO_BRACKETS)
    for _ in range(DEEPEST // 2):  # each takes one level away, or two
        if not left:
            return True
        left = left.replace(b"[]", b"").replace(b"{}", b"")
    return False


def _check_depth(value: Any) -> None:
    containers = [value] if type(value) in (dict, list) else []
    for _ in range(DEEPEST):
        if not containers:
            return
        level, containers = containers, []
        for one in level:
            for part in one.values() if type(one) is dict else one:
                if type(part) is dict or type(part) is list:
                    containers.append(part)
    raise RecursionError


def complaint(value: Any, kind: Any, where: str = "") -> str | None:
    """The first thing that keeps a value from being of a type, with its place; None if it is of the type."""
    here = f"{where}: " if where else ""
    if kind is Any:
        return None
    if get_origin(kind) in (Union, types.UnionType):
        faults = [complaint(value, one, where) for one in get_args(kind)]
        return None if None in faults else faults[0]
    if get_origin(kind) is Literal:
        choices = ", ".join(map(str, get_args(kind)))
        return None if value in get_args(kind) else f"{here}must be one of {choices}, got {_show(value)}"
    sort = dict if is_typeddict(kind) else get_origin(kind) or kind
    word, fits = _SORTS[sort]
    if not fits(value):
        return f"{here}must be {word}, got {_show(value)}" if where else f"not a JSON {_ROOTS.get(sort, word)}"
    if is_typeddict(kind) and (missing := kind.__required_keys__ - value.keys()):
        return f"{here}no '{min(missing)}'"
    if sort is tuple and len(value) != len(get_args(kind)):
        return f"{here}must have {len(get_args(kind))} entries, got {len(value)}"
    return next(filter(None, (complaint(*part) for part in _parts(value, kind, where))), None)


def _parts(value: Any, kind: Any, where: str) -> Iterator[tuple[Any, Any, str]]:
    """The parts of a mapping or list with their types and places."""
    dot = f"{where}." if where else ""
    if is_typeddict(kind):
        hints = _hints(kind)
        yield from ((value[name], hint, f"{dot}{name}") for name, hint in hints.items() if name in value)
    elif get_origin(kind) is dict and get_args(kind)[1] is not Any:
        yield from ((part, get_args(kind)[1], f"{dot}{name}") for name, part in value.items())
    elif get_origin(kind) is tuple:
        yield from ((part, get_args(kind)[number], f"{dot}{number}") for number, part in enumerate(value))
    elif get_origin(kind) is list:
        yield from ((part, get_args(kind)[0], f"{dot}{number}") for number, part in enumerate(value))


_ROOTS = {dict: "object", list: "list"}
_hints = cache(get_type_hints)


def _show(value: Any) -> str:
    """A value in a message, short."""
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    return f"{json.dumps(value):.60}"
