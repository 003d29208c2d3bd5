"""Libraries that only some kinds of tasks need."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from mergebench.errors import RecipeError


def need(library: str, what: str) -> str:
    """The version of a library of the extra [eval], which is not imported; `RecipeError` where it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        raise RecipeError(f"{what} need {library}, which is not installed", "pip install 'mergebench[eval]'") from None
