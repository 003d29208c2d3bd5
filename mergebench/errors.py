"""Errors that say where the problem is, what it is and how to fix it.

Every error a user can cause is a `MergebenchError`: one line, a hint, an exit code. The command line
prints it without a traceback; library users catch it.
"""

from __future__ import annotations

import difflib
import errno
import pickle
import re
import traceback
from collections.abc import Iterable

LONGEST = 480  # characters of a message or a hint; what is longer is a name or a text from a file
_LINE, _WORD = 4000, 120  # characters of any other line, and that a word keeps in a line longer than a message


def shown(text: str, most: int = _LINE) -> str:
    """Text for people as one line of at most so many characters: `escaped`, long words cut in the middle."""
    line = escaped(text)
    if len(line) > LONGEST:
        line = re.sub(rf"\S{{{_WORD + 1},}}", lambda word: cut(word[0], _WORD), line)
    return cut(line, most)


def escaped(text: str) -> str:
    """Text in which nothing is left that a terminal obeys, nor a line break: a file may call a tensor anything."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def human(size: float) -> str:
    """Bytes in words: `91 kB`, `4.41 GB`."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB" if size < 999.5 else f"{size:.0f} GB"


def counted(number: int, what: str) -> str:
    """`1 tensor`, `2,000 tensors`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def cut(text: str, most: int) -> str:
    """Text of at most so many characters, cut in the middle."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


class MergebenchError(Exception):
    """A failure with a message (where: what), an optional hint (how to fix it) and an exit code."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = shown(message, LONGEST)
        self.hint = None if hint is None else shown(hint, LONGEST)
        super().__init__(self.message)

    def __reduce__(self) -> tuple[type[MergebenchError], tuple[str, str | None]]:
        return type(self), (self.message, self.hint)  # worker processes send their errors home


class RunError(MergebenchError):
    """The work failed: a damaged file, a non-finite value, a full disk."""


class DiskFull(RunError):
    """The disk has no room left for the output."""


class GateFailed(MergebenchError):
    """The work is done, and what was measured breaks a limit that was set: for CI to tell from a crash."""

    exit_code = 4


class RecipeError(MergebenchError):
    """The recipe or the command is not valid."""

    exit_code = 2


class ModelError(MergebenchError):
    """A model is missing, or the models do not fit together."""

    exit_code = 3


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused: Python, NumPy, the system, torch and C++ each say it in their own way."""
    words = ("allocate memory", "out of memory", "bad_alloc", "start new thread", "failed to map segment")
    if isinstance(error, OSError):
        return error.errno in (errno.ENOMEM, errno.EAGAIN)
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint naming the closest known name, whatever its case, or all of them when none is close."""
    known = sorted(known)
    lower = {one.lower(): one for one in reversed(known)}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{lower[close[0]]}'?"
    return f"known: {', '.join(known)}" if known else None


def first_line(error: BaseException) -> str:
    """The message of another library's error, on one line."""
    said = str(error).strip()
    if not said:  # an assertion: the line that failed says more than its name
        trace = traceback.extract_tb(error.__traceback__)
        said = f"{type(error).__name__}: {trace[-1].line if trace else ''}"
    first, *rest = [line.strip() for line in said.splitlines()]
    return f"{first} {rest[-1]}" if rest and first.endswith(":") else first  # of a trace, what was raised


def in_words(error: BaseException) -> str:
    """What any error says, on one line: of the system's, the file and the fault."""
    if isinstance(error, MergebenchError):
        return error.message
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    return first_line(error)


def sendable(error: Exception) -> Exception:
    """An error that another process can raise: one of ours as it is, any other with the place where it happened."""
    if isinstance(error, MergebenchError):
        return error
    place = f"in a worker process:\n{traceback.format_exc()}"
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(place)
    return error
