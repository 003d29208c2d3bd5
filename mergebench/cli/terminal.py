"""A rich console that shows text of files as text."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast

from rich.console import Console, RenderableType
from rich.segment import Segment
from rich.text import Text

from mergebench.cli.streams import Obeyed, Stream
from mergebench.errors import escaped, shown


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
    """stdout; a pipe has no width, so tables take the room they need."""
    return Terminal(sys.stdout, None if sys.stdout.isatty() else 200)


def err() -> Terminal:
    """stderr."""
    return Terminal(sys.stderr)
