"""What a directory's own Markdown says: the card that every command writes beside its result, or a run's tables."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoint.documents import read_bytes
from mergebench.checkpoint.lineage import front_matter
from mergebench.errors import human
from mergebench.evaluation.page.figures import Figure
from mergebench.evaluation.page.parts import (
    Facts,
    Fold,
    Gallery,
    Part,
    Picture,
    Points,
    Section,
    Table,
    Text,
    Verbatim,
    cells,
    lasted,
)
from mergebench.evaluation.page.sources import Sources

NAMES = ("README.md", "results.md")
MOST = 4_000_000  # bytes of a picture that the page takes in
ROWS = 600  # of a table
_FENCE = re.compile(r"(`{3,})")
_PICTURE = re.compile(r"!\[(.*)\]\(([\w.-]+)\.png\)")


def sections(sources: Sources) -> Iterator[Section]:
    """The card's paragraphs, lists, tables and pictures, then the numbers of `mergebench.json`; of a merge nothing, as
    the page shows it better."""
    if sources.provenance is None or sources.merged:
        return
    file = next((file for name in NAMES if (file := sources.directory / name).is_file()), None)
    if file is not None:
        for section in _sections(file, sources.plots):
            parts = [part for part in section.parts if part != Text(lead(sources))]  # it stands at the head
            yield from [Section(section.title, parts)] * bool(parts)
        if file.name != NAMES[0]:
            picture = _picture(file.parent, file.stem, "The plot of the tables.", sources.plots)
            if picture is not None:
                yield Section("Plot", [picture])
    yield Section("Provenance", list(_numbers(sources.provenance)))


def lead(sources: Sources) -> str:
    """The first paragraph, which says what was made or found; empty where there is no text."""
    files = [file for name in NAMES if (file := sources.directory / name).is_file()]
    parts = [part for file in files[:1] for one in _sections(file, {}) for part in one.parts]
    return next((part.text for part in parts if isinstance(part, Text)), "")


def _sections(file: Path, plots: Mapping[str, Figure]) -> Iterator[Section]:
    _, lines = front_matter(file)
    title, parts = "Result", list[Part]()
    while lines:
        line = lines.pop(0)
        if heading := re.match(r"##+ (.*)", line):
            if parts:
                yield Section(title, parts)
            title, parts = _plain(heading[1]), []
        elif fence := _FENCE.match(line):
            parts.append(Verbatim("\n".join(_until(lines, lambda one, mark=fence[1]: one == mark))))
            lines[:1] = []
        elif line.startswith("|"):
            rows = [line, *_until(lines, lambda one: not one.startswith("|"))]
            head, _, *body = [[_plain(cell.strip()) for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
            parts.append(Table(head, [cells(*row) for row in body[:ROWS]], ""))
        elif picture := _PICTURE.fullmatch(line):
            shown = _picture(file.parent, picture[2], _plain(picture[1]), plots)
            parts += [] if shown is None else [shown]
        elif line.startswith("- "):
            items = [line, *_until(lines, lambda one: not one.startswith("- "))]
            parts.append(Points([_plain(item[2:]) for item in items]))
        elif line.strip() and not line.startswith("# "):
            more = _until(lines, lambda one: not one.strip() or one[0] in "|-#`!")
            text = _plain(" ".join([line, *more]))
            if parts and isinstance(parts[-1], Table) and not parts[-1].caption:
                parts[-1] = parts[-1]._replace(caption=text)  # how to read it
            else:
                parts.append(Text(text))
    if parts:
        yield Section(title, parts)


def _until(lines: list[str], ends: Any) -> list[str]:
    """Takes the lines before the first that ends a block."""
    count = next((number for number, line in enumerate(lines) if ends(line)), len(lines))
    taken, lines[:] = lines[:count], lines[count:]
    return taken


def _plain(text: str) -> str:
    """Markdown without its marks."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"(?<!\\)(\*\*|`+)", "", text)
    return re.sub(r"\\(.)", r"\1", text)


def _picture(folder: Path, name: str, alt: str, plots: Mapping[str, Figure]) -> Gallery | Picture | None:
    """A plot in the page's own colours and width where it can be drawn again, else the file NAME.png."""
    if name in plots:
        return Gallery([plots[name]], plots[name].caption)
    file = folder / f"{name}.png"
    if not file.is_file() or file.stat().st_size > MOST:
        return None
    return Picture(base64.b64encode(read_bytes(file)).decode(), alt)


def _numbers(provenance: Any) -> Iterator[Part]:
    """What is one value or a few as a fact, what is one row for each entry as a table."""
    facts, tables = [], []
    for key, value in provenance.items():
        if value in ({}, [], None, ""):
            continue
        name = "took" if key == "seconds" else key.replace("_", " ")
        entries = list(value.items()) if isinstance(value, dict) else list(enumerate(value, 1)) if _list(value) else []
        rows = {str(label): one for label, one in entries if isinstance(one, dict)}
        if rows and len(rows) == len(entries):
            heads = list(dict.fromkeys(head for row in rows.values() for head, one in row.items() if not _nested(one)))
            words = [
                head for head in heads if any(isinstance(row.get(head), (str, list, dict)) for row in rows.values())
            ]
            heads = [*words, *(head for head in heads if head not in words)]
            body = [cells(label, *(_said(head, row.get(head)) for head in heads)) for label, row in rows.items()]
            note = f"The first {ROWS} of {len(body)}; all are in mergebench.json." if len(body) > ROWS else ""
            table = Table(["", *(head.replace("_", " ") for head in heads)], body[:ROWS], note, 1 + len(words))
            tables.append(Fold(name if len(body) == 1 else f"{len(body)} {name}", [table]))
        elif not _nested(value):
            facts.append((name, _said(key, value)))
    yield Facts(facts)
    yield from tables


def _list(value: object) -> bool:
    return isinstance(value, list)


def _nested(value: object) -> bool:
    """Whether it is more than a cell shows."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(isinstance(one, (dict, list)) for one in inner) or len(list(inner)) > 12


def _said(key: str, value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(name, one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(_said("", one) for one in value)
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and key in ("energy_kept", "energy_of_all", "left_out", "share"):
        return f"{value:.2%}"
    if key == "seconds":
        return lasted(value)
    if key in ("size", "bytes", "peak_memory", "bytes_read", "bytes_written") and isinstance(value, int):
        return human(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
