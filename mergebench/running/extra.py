"""Libraries that only some kinds of tasks need."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from mergebench.errors import RecipeError

_SMALLER = {"scikit-learn": "probe"}  # the extra that has it and least besides; [eval] has all


def need(library: str, what: str) -> str:
    """The version of a library of an extra, which is not imported; `RecipeError` where it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        extra = _SMALLER.get(library, "eval")
        hint = f"pip install 'mergebench[{extra}]', or in a clone: pip install -e '.[{extra}]'"
        raise RecipeError(f"{what} need {library}, which is not installed", hint) from None
