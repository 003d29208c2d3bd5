"""Merge methods that a recipe names by their file: `merge_method: my_merges.py:equal_length`."""

from __future__ import annotations

from typing import Any

from mergebench import methods
from mergebench.engine.method import Method
from mergebench.errors import RecipeError
from mergebench.recipe.positions import Loc, Places
from mergebench.recipe.yaml import Document


def read_methods(data: dict[str, Any], document: Document, given: Method | None) -> None:
    """Run the files that `merge_method` and the baselines name, and put where they were found in their place; a method
    that was `given` takes the place of the recipe's.

    A file is run because the user named it: not if the recipe is what lies in a directory.
    """
    if given is not None:
        data["merge_method"] = methods.add(given)
    elif "merge_method" in data:
        data["merge_method"] = _read(data["merge_method"], ("merge_method",), document)
    measured = data.get("evaluate")
    listed = measured.get("baselines") if isinstance(measured, dict) else None
    baselines: list[Any] = listed if isinstance(listed, list) else []
    for i, written in enumerate(baselines):
        loc: Loc = ("evaluate", "baselines", i)
        if isinstance(written, dict):
            baselines[i] = {_read(name, (*loc, name), document): given for name, given in written.items()}
        else:
            baselines[i] = _read(written, loc, document)


def get(name: str, loc: Loc, places: Places) -> Method:
    """The method that a recipe names at `loc`."""
    try:
        return methods.get(name)
    except RecipeError as error:
        raise places.error(loc, error.message, error.hint) from None


def _read(written: Any, loc: Loc, document: Document) -> Any:
    places = document.places
    if not isinstance(written, str):
        return written
    if methods.in_file(written) and not document.given and not places.where(loc).startswith("--"):
        what = f"'{written}' is code, and a directory's recipe runs none"
        raise places.error(loc, what, f"if you trust it, name it yourself: --set {loc[0]}={written}")
    try:
        return methods.read(written, document.folders)
    except RecipeError as error:
        raise places.error(loc, error.message, error.hint) from None
