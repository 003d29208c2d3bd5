"""A rich console that shows text of files as text."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast

from rich.console import Console, RenderableType
from rich.segment import Segment
from rich.text import Text

from mergebench.cli.streams import Obeyed, Stream, columns
from mergebench.errors import escaped, shown

WIDEST = 10_000  # columns: more than any table has


class Terminal(Console):
    """Strings (a table's cells, a bar's label) are taken literally and `shown`; in any other text codes are escaped."""

    def __init__(self, stream: Any, width: int | None = None) -> None:
        file = Obeyed(stream) if isinstance(stream, Stream) else stream
        super().__init__(file=cast(TextIO, file), width=width, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(shown(text), **how)

    def render(self, renderable: RenderableType, options: Any = None) -> Iterable[Segment]:
        for one in super().render(renderable, options):
            plain = one.control or one.text.replace("\n", "").isprintable()
            yield one if plain else one._replace(text="\n".join(map(escaped, one.text.split("\n"))))


def out() -> Terminal:
    """stdout."""
    return Terminal(sys.stdout, columns(sys.stdout) or WIDEST)


def err(most: int = WIDEST) -> Terminal:
    """stderr, or the first columns of it."""
    return Terminal(sys.stderr, min(columns(sys.stderr) or WIDEST, most))
