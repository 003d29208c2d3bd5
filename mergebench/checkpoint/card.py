"""Markdown beside a result: its card, README.md. Names and settings come from files; in Markdown they stay text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mergebench.errors import escaped


def escape(text: str) -> str:
    """Text that is no Markdown and no HTML, on one line: for a paragraph, an item of a list, a cell."""
    line = re.sub(r"([\\|*_`<\[\]&~$])", r"\\\1", escaped(" ".join(text.split())))
    return re.sub(r"^(#|>|=|[-+](?=\s|-|$)|\d+[.)](?=\s|$))", lambda found: f"{found[0][:-1]}\\{found[0][-1]}", line)


def code(text: object) -> str:
    """Text as a span of code, with more backticks around it than it has in a row."""
    line = escaped(str(text))
    ticks = "`" * (1 + _longest(line))
    room = " " if "`" in line else ""
    return f"{ticks}{room}{line}{room}{ticks}"


def fence(text: str, language: str) -> str:
    """Lines of code as a block, likewise."""
    ticks = "`" * max(3, 1 + _longest(text))
    return f"{ticks}{language}\n{text.strip()}\n{ticks}"


def _longest(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def card(name: str, parts: Iterable[str], *, tags: Sequence[str], library: str | None = None) -> str:
    """README.md of a result called `name`: what the hub reads, a title, then paragraphs of Markdown."""
    head = [*([] if library is None else [f"library_name: {library}"]), "tags:", *(f"- {tag}" for tag in tags)]
    return "\n\n".join(["\n".join(["---", *head, "---", f"# {escape(name)}"]), *filter(None, parts)]) + "\n"


def listed(items: Iterable[str]) -> str:
    """Items, each Markdown already, as a list; empty for none."""
    return "\n".join(f"- {item}" for item in items)
