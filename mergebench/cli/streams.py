"""stdout and stderr while a command runs: no control character of a file gets through, and no note can fail."""

from __future__ import annotations

import codecs
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# A terminal obeys these, or is led to show text in another order. Tabs stay, and what progress bars begin with.
_OBEYED = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
_COLOURS = r"\x1b\[[\d;]*m"
_BAR = re.compile(r"\r|(?:\x1b\[A)*")


_ASCII = {"−": "-", "–": "-", "…": ".", "±": "+-", "█": "#", "×": "x", "’": "'"}


def _spelt(error: UnicodeError) -> tuple[str, int]:
    """What an encoding has no character for, in ASCII: as much alike as can be."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or ascii(c)[1:-1] for c in text), error.end


codecs.register_error(_spelt.__name__, _spelt)


class Stream:
    """A text stream that escapes control characters, whoever writes them: this program, a library, a warning."""

    def __init__(self, raw: TextIO, *, passed_over: tuple[type[Exception], ...] = ()) -> None:
        self.raw, self._passed_over = raw, passed_over
        if isinstance(raw, io.TextIOWrapper):
            raw.reconfigure(errors=_spelt.__name__)  # a minus, where all is ASCII
        styled = raw.isatty() or any(map(os.environ.get, ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")))
        self._obeyed = re.compile(f"(?!{_COLOURS}){_OBEYED}" if styled else _OBEYED)

    def write(self, text: str) -> int:
        begin = _BAR.match(text)
        assert begin is not None
        self.obeyed(begin[0] + self._obeyed.sub(lambda found: repr(found[0])[1:-1], text[begin.end() :]))
        return len(text)

    def obeyed(self, text: str) -> None:
        """Write text as it is: the codes of a progress bar."""
        with suppress(*self._passed_over):
            self.raw.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with suppress(*self._passed_over):
            self.raw.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


class Obeyed:
    """The same stream for text whose codes are this program's own."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.obeyed(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def columns(stream: Any) -> int | None:
    """How wide a terminal is; None of a pipe or a file, which take lines of any length."""
    if not stream.isatty():
        return None
    given = os.environ.get("COLUMNS", "")
    try:
        return int(given) if given.isdecimal() and int(given) else os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def open_closed() -> None:
    """Let the standard streams that the caller closed lead nowhere.

    Else the next file that is opened gets the number of one, and what a library writes to stderr ends up in it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))


@contextmanager
def guarded() -> Iterator[None]:
    """Within it `sys.stdout` and `sys.stderr` are guarded; a message that stderr cannot take does not end the work."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr, passed_over=(OSError, ValueError))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
