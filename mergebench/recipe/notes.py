"""Notes on what a recipe may do unexpectedly, a line each, for people and for provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mergebench.checkpoint.names import layer_of
from mergebench.recipe.recipe import Entry, Recipe
from mergebench.recipe.slices import comes_before

SHOWN = 3  # names in a note


def about_gradients(names: Iterable[str], params: Callable[[str, float], dict[str, Any]]) -> tuple[str, ...]:
    """Note the tensors after the layers that get a gradient's first value; `params(name, depth)` gives the
    parameters."""
    after = [name for name in names if layer_of(name) is None and not comes_before(name)]
    found = [name for name in after if params(name, 0.0) != params(name, 1.0)]
    if not found:
        return ()
    them = ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
    return (
        f"{them}: after the layers, yet a gradient's first value holds, as in mergekit; set it by {{filter, value}}",
    )


def about_the_base(recipe: Recipe, skipped: Sequence[Entry]) -> tuple[str, ...]:
    """Note the parameters of a base that is listed among the models and skipped."""
    given = [entry for entry in skipped if entry.parameters]
    if not given:
        return ()
    place = recipe.where("models", recipe.models.index(given[0]), "parameters")
    names = ", ".join(given[0].parameters)
    return (f"{place}: {names}: not used, the model is the base and '{recipe.merge_method}' merges differences to it",)
