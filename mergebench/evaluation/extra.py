"""Libraries that only some kinds of tasks need."""

from __future__ import annotations

from importlib.util import find_spec

from mergebench.errors import RecipeError


def need(module: str, library: str, what: str) -> None:
    """`RecipeError` where a library of the extra [eval] is not installed; imports nothing."""
    if find_spec(module) is None:
        raise RecipeError(f"{what} need {library}, which is not installed", "pip install 'mergebench[eval]'")
