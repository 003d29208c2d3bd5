"""Damage done to files, by seed: to their bytes, to the structure of their JSON, to the headers of safetensors."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from models import pack

DEEP: Any = None
for _ in range(150):
    DEEP = [DEEP]
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**40, 2**63, 2**70, 10**400, -(10**400), 0.5, -0.5, 1e308, 1e-320, float("nan"),
    float("inf"), float("-inf"), "", " ", "x", "x" * 300, "\ud800", "a\udfffb", "\x1b[31mred", "two\nlines", "\0",
    "\u202e", "../x", "/", "base", "NaN", "(a+)+$", "[", [], {}, [[]], [None], [1, 2], ["x"], [{}], {"": 1},
    {"x": {"x": 1}}, {"a": None}, DEEP,
]  # fmt: skip


def damaged(raw: bytes, seed: int) -> bytes:
    """A file's content, damaged once or twice: as JSON, as the header of safetensors, or as bytes."""
    random_ = random.Random(seed)
    for _ in range(random_.choice((1, 1, 2))):
        raw = random_.choice(_ways(raw))(raw, random_)
    return raw


def _ways(raw: bytes) -> list[Callable[[bytes, random.Random], bytes]]:
    parts = _unpacked(raw)
    if parts is not None:
        return [_header, _header, _header, _data, _bytes]
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return [_lines, _bytes]
    return [_document, _document, _document, _document, _text, _bytes]


def _unpacked(raw: bytes) -> tuple[Any, bytes] | None:
    length = int.from_bytes(raw[:8], "little")
    try:
        return (json.loads(raw[8 : 8 + length]), raw[8 + length :]) if 8 + length <= len(raw) and length else None
    except (ValueError, RecursionError):
        return None


def _header(raw: bytes, random_: random.Random) -> bytes:
    """The header, or the JSON in its metadata."""
    header, data = _unpacked(raw) or ({}, b"")
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if isinstance(metadata, dict) and metadata and random_.random() < 0.7:
        key = random_.choice(list(metadata))
        try:
            metadata[key] = json.dumps(changed(json.loads(metadata[key]), random_))
        except (TypeError, ValueError, RecursionError):
            metadata[key] = random_.choice(ODD)
        return pack(json.dumps(header).encode(), data)
    return pack(_dumped(changed(header, random_), random_), data)


def _data(raw: bytes, random_: random.Random) -> bytes:
    header, data = _unpacked(raw) or ({}, b"")
    place = random_.randrange(len(data) or 1)
    return pack(json.dumps(header).encode(), data[:place] + random_.choice((b"\xff" * 8, b"")) + data[place + 8 :])


def _document(raw: bytes, random_: random.Random) -> bytes:
    return _dumped(changed(json.loads(raw), random_), random_)


def _lines(raw: bytes, random_: random.Random) -> bytes:
    """One line of several: JSON lines, or YAML."""
    lines = raw.split(b"\n")
    place = random_.randrange(len(lines))
    try:
        lines[place] = _dumped(changed(json.loads(lines[place]), random_), random_)
    except (ValueError, RecursionError):
        lines[place] = random_.choice((b"", b"- x", b"  a: [", b"\t", b"&a [*a]", b"!!python/object:x {}", *lines))
    return b"\n".join(lines)


def _text(raw: bytes, random_: random.Random) -> bytes:
    """A document that is no longer one."""
    places = [i for i, byte in enumerate(raw) if byte in b'{}[],:"'] or [0]
    at = random_.choice(places)
    more = (b"[" * 100_000, b"{", b'"', b",", b"\\ud800", b"\\x", b"1" * 5000, b"1e999", b"NaN", b"//", b"\0", b"")
    return raw[:at] + random_.choice(more) + raw[at + random_.randrange(2) :]


def _bytes(raw: bytes, random_: random.Random) -> bytes:
    at = random_.randrange(len(raw) or 1)
    text = raw.decode(errors="replace")
    return random_.choice((
        raw[:at],
        raw[:at] + bytes([random_.randrange(256)]) + raw[at + 1 :],
        raw[:at] + b"\xff\xfe" + raw[at:],
        raw[:at] + b"\xed\xa0\x80" + raw[at:],
        b"\xef\xbb\xbf" + raw,
        text.encode("utf-16"),
        raw.replace(b"\n", b"\r\n"),
        raw + raw,
        b"",
        b"null",
        b"[" * 100_000,
    ))  # fmt: skip


def changed(document: Any, random_: random.Random) -> Any:
    """A document with one part replaced, removed, renamed, moved or added."""
    document = deepcopy(document)
    holder, key = _place(document, random_)
    if holder is None:
        return deepcopy(random_.choice(ODD))
    way = random_.choice(("replace", "replace", "replace", "remove", "rename", "add", "swap", "type"))
    if way == "remove":
        del holder[key]
    elif way == "rename" and isinstance(holder, dict):
        holder[random_.choice([one for one in ODD if isinstance(one, str)])] = holder.pop(key)
    elif way == "add" and isinstance(holder, dict):
        holder[random_.choice(["x", "\ud800", "", *holder])] = deepcopy(random_.choice(ODD))
    elif way == "swap":
        other, there = _place(document, random_)
        if other is not None:
            holder[key], other[there] = deepcopy(other[there]), deepcopy(holder[key])
    elif way == "type":
        value = holder[key]
        holder[key] = [value] if random_.random() < 0.5 else str(value)
    else:
        holder[key] = deepcopy(random_.choice(ODD))
    return document


def _place(document: Any, random_: random.Random) -> tuple[Any, Any]:
    """A random part of a document: what holds it, and its key; the deeper ones as often as the upper ones."""
    holder, key, here = None, None, document
    while isinstance(here, (dict, list)) and here and (holder is None or random_.random() < 0.7):
        holder, key = here, random_.choice(list(here) if isinstance(here, dict) else range(len(here)))
        here = here[key]
    return holder, key


def _dumped(document: Any, random_: random.Random) -> bytes:
    try:
        text = json.dumps(document, ensure_ascii=random_.random() < 0.5)
    except (RecursionError, ValueError):
        return b"[" * 500
    return text.encode("utf-8", "surrogatepass")
