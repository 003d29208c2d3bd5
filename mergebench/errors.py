"""Errors that say where the problem is, what it is and how to fix it.

Every error a user can cause is a `MergebenchError`: one line, a hint, an exit code. The command line
prints it without a traceback; library users catch it.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable

LONGEST = 480  # characters of a message or a hint; what is longer is a name or a text from a file
_WORD = 120  # characters that a word keeps in a message that is too long


class MergebenchError(Exception):
    """A failure with a message (where: what), an optional hint (how to fix it) and an exit code."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = one_line(message)
        self.hint = None if hint is None else one_line(hint)
        super().__init__(self.message)

    def __reduce__(self) -> tuple[type[MergebenchError], tuple[str, str | None]]:
        return type(self), (self.message, self.hint)  # worker processes send their errors home


class RunError(MergebenchError):
    """The work failed: a damaged file, a non-finite value, a full disk."""


class DiskFull(RunError):
    """The disk has no room left for the output."""


class RecipeError(MergebenchError):
    """The recipe or the command is not valid."""

    exit_code = 2


class ModelError(MergebenchError):
    """A model is missing, or the models do not fit together."""

    exit_code = 3


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint naming the closest known name, or all of them when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(known)}" if known else None


def one_line(text: str) -> str:
    """A message on one line and of bearable length: control characters written out, long words cut in the middle."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    if len(line) > LONGEST:
        line = re.sub(rf"\S{{{_WORD + 1},}}", lambda word: _cut(word[0], _WORD), line)
    return _cut(line, LONGEST)


def _cut(text: str, most: int) -> str:
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def first_line(error: BaseException) -> str:
    """The message of another library's error, on one line."""
    said = str(error).strip()
    if not said:  # an assertion: the line that failed says more than its name
        trace = traceback.extract_tb(error.__traceback__)
        said = f"{type(error).__name__}: {trace[-1].line if trace else ''}"
    return said.splitlines()[0]
