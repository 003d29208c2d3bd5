"""Errors that say where the problem is, what it is and how to fix it.

Every error a user can cause is a `MergebenchError`: one line, a hint, an exit code. The command line
prints it without a traceback; library users catch it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MergebenchError(Exception):
    """A failure with a message (where: what), an optional hint (how to fix it) and an exit code."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

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
