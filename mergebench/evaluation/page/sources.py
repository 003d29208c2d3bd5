"""The documents in a directory that a page can show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mergebench.checkpoint.documents import document
from mergebench.checkpoint.target import PROVENANCE, is_provenance
from mergebench.errors import RecipeError, RunError
from mergebench.evaluation.page import profile
from mergebench.evaluation.page.profile import Profile
from mergebench.evaluation.results import FILE, Results

SEARCH = "search.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Sources:
    """The documents of one directory, each None if it is missing."""

    directory: Path
    results: Results | None
    provenance: Mapping[str, Any] | None
    search: Mapping[str, Any] | None
    profile: Profile | None


def read(directory: Path) -> Sources:
    """Read them; `RecipeError` where there are none to show, `RunError` where one is damaged."""
    if not directory.is_dir():
        hint = "name what mergebench merge, eval or search wrote: a directory"
        raise RecipeError(f"{directory}: {'not a' if directory.exists() else 'no such'} directory", hint)
    found = Sources(
        directory,
        _there(directory / FILE, Results.load),
        _there(directory / PROVENANCE, _provenance),
        _there(directory / SEARCH, _document),
        _there(directory / profile.FILE, _profile),
    )
    if found.results is None and found.provenance is None and found.search is None:
        raise RecipeError(f"{directory}: nothing to show", f"it has no {FILE}, {PROVENANCE} or {SEARCH}")
    return found


def _there(path: Path, load: Callable[[Path], T]) -> T | None:
    return load(path) if path.is_file() else None


def _document(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = document(path, hint="take it away, or make it again")
    return found


def _provenance(path: Path) -> dict[str, Any]:
    found = _document(path)
    if not is_provenance(found):
        raise RunError(f"{path}: it is not what mergebench writes beside a result", "take it away, or make it again")
    return found


def _profile(path: Path) -> Profile | None:
    """The statistics; None if they are damaged or from an older version, and the page leaves them out."""
    with suppress(OSError, ValueError):
        return Profile.load(path.parent)
    return None
