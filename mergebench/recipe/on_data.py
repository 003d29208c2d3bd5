"""`statistics:` and `data:` of a recipe's models, for the methods that read what a model does on data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mergebench.engine.method import Method
from mergebench.errors import RecipeError
from mergebench.recipe.positions import Loc, Places

KEYS = ("statistics", "data")


def check(method: Method, found: Mapping[str, Any], places: Places) -> None:
    """Check that models have what the method reads, and nothing that it does not."""
    entries = found.get("models", ())
    for i, entry in enumerate(entries):
        _check_entry(method, entry, ("models", i), places)
    if method.statistics is None:
        return
    for key in ("slices", "tokenizer", "tokenizer_source"):
        if found.get(key):
            what = f"'{method.name}' reads what whole models do, tensor by tensor as they are"
            raise places.error((key,), what, "merge without it first, or after, by a merge of its own")
    for i, entry in enumerate(entries):
        if ("data" in entry) != ("data" in entries[0]):
            raise places.error(("models", i), "models with data and with statistics", "give all of them the same key")


def _check_entry(method: Method, entry: Mapping[str, Any], loc: Loc, places: Places) -> None:
    given = [key for key in KEYS if entry.get(key) is not None]
    if given and method.statistics is None:
        raise places.error((*loc, given[0]), f"'{method.name}' reads no {given[0]}", "leave it out, or take fisher")
    if len(given) == 2:
        raise places.error((*loc, "data"), "cannot be given with statistics", "give one of them")
    if method.statistics is not None and not given:
        what = f"has neither statistics nor data, '{method.name}' needs what it does on texts"
        raise places.error(loc, what, "write data: FILE, or make statistics once: mergebench statistics")
    if method.statistics is not None and entry.get("task_vector") is not None:
        raise places.error((*loc, "task_vector"), "is no model that runs", "name the model itself")


def for_method(method: Method, entry: Any, given: str | None) -> Any:
    """An entry without the keys that a method does not read; `RecipeError` if it lacks what the method reads.

    given: the kind of the entry's statistics.
    """
    if method.statistics is None:
        return dataclasses.replace(entry, statistics=None, data=None)
    if entry.statistics is None or method.statistics != given:
        raise RecipeError(
            f"'{method.name}' needs statistics: of each model, of kind {method.statistics}",
            "merge it by itself, or leave it out",
        )
    return entry
