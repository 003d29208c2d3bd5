"""The documents in a directory that a page can show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mergebench.checkpoint.documents import document
from mergebench.checkpoint.drawing import Look
from mergebench.checkpoint.target import PROVENANCE, is_provenance
from mergebench.errors import RecipeError, RunError
from mergebench.evaluation.page import figures, profile
from mergebench.evaluation.page.figures import Figure
from mergebench.evaluation.page.profile import Profile
from mergebench.evaluation.results import FILE, Results
from mergebench.evaluation.tables.layout import short_names

MERGE = "the merge"
SEARCH = "search.json"
T = TypeVar("T")
Plots = Callable[[Mapping[str, Any], Path], "Sequence[Figure]"]  # of a provenance and its directory


@dataclass(frozen=True)
class Sources:
    """The documents of one directory, each None if it is missing."""

    directory: Path
    results: Results | None
    provenance: Mapping[str, Any] | None
    search: Mapping[str, Any] | None
    profile: Profile | None
    plots: Mapping[str, Figure] = field(default_factory=dict)  # by the name of the file that the command wrote too
    runs: tuple[Sources, ...] = ()  # that these results were joined from
    origins: Mapping[str, int] = field(default_factory=dict)  # the run that each model but the base is from

    @property
    def merged(self) -> bool:
        """Whether the provenance is that of models merged or edited by a recipe."""
        return "merge_method" in (self.provenance or {}).get("recipe", {})

    @cached_property
    def looks(self) -> dict[str, Look]:
        """How each model is drawn in every plot, by the name that is shown; the merge by `MERGE` too."""
        roles: dict[str, str] = {}
        if self.results is not None:
            names = short_names(self.results.models)
            roles = {names[record.model]: record.role for record in self.results.records}
        merged = next((name for name, role in roles.items() if role == "merged"), MERGE)
        roles |= {name: "input" for name in (self.profile.models if self.profile else ()) if name not in roles}
        found = figures.looks({**roles, merged: "merged"})
        return {**found, MERGE: found[merged]}


def no_plots(provenance: Mapping[str, Any], directory: Path) -> Sequence[Figure]:
    """Of no result."""
    return ()


def read(directory: Path, plots: Plots = no_plots) -> Sources:
    """Read them; `RecipeError` where there are none to show, `RunError` where one is damaged.

    plots: of a result that no recipe made; what fails there is left out.
    """
    if not directory.is_dir():
        hint = "name a directory that mergebench wrote"
        raise RecipeError(f"{directory}: {'not a' if directory.exists() else 'no such'} directory", hint)
    found = Sources(
        directory,
        _there(directory / FILE, Results.load),
        _there(directory / PROVENANCE, _provenance),
        _there(directory / SEARCH, _document),
        _there(directory / profile.FILE, _profile),
    )
    if found.results is None and found.provenance is None and found.search is None:
        near = sorted(file.parent.name for file in directory.glob(f"*/{PROVENANCE}"))[:4]
        hint = f"name one of its results: {', '.join(near)}" if near else f"it has no {FILE}, {PROVENANCE} or {SEARCH}"
        raise RecipeError(f"{directory}: nothing to show", hint)
    drawn: Sequence[Figure] = ()
    with suppress(Exception):  # a result of another version; the card's own pictures are shown
        drawn = plots(found.provenance or {}, directory)
    return replace(found, plots={figure.name: figure for figure in drawn})


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
