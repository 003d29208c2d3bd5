"""Find and open the models and files that a recipe names; short names of models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergebench.checkpoint import Model
from mergebench.checkpoint.reference import Location, locate, looked_in
from mergebench.deltas.open import open_model
from mergebench.errors import MergebenchError, RecipeError
from mergebench.recipe.positions import Loc
from mergebench.recipe.recipe import Recipe
from mergebench.recipe.yaml import find


def folders(recipe: Recipe) -> list[Path]:
    """Where relative paths are looked up after the working directory."""
    return list(recipe.folders)


def find_file(text: str, folders: Sequence[Path]) -> Path:
    """A file that a recipe names: from the working directory, then from `folders`."""
    found = find(text, folders)
    if found is None:
        raise RecipeError(f"no such file: {text}", looked_in(text, folders))
    return found


def open_named(recipe: Recipe, reference: str, loc: Loc, task_vector: bool = False) -> Model:
    """Open the model that a recipe names at `loc`."""
    locate_named(recipe, reference, loc)
    return open_model(reference, folders=folders(recipe), task_vector=task_vector)


def locate_named(recipe: Recipe, reference: str, loc: Loc) -> Location:
    """Find the model that a recipe names at `loc`."""
    try:
        return locate(reference, folders(recipe))
    except MergebenchError as error:  # a missing model is an error of the recipe: add where it is named
        raise type(error)(f"{recipe.where(*loc)}: {error.message}", error.hint) from None


def models_of(recipe: Mapping[str, Any]) -> list[str]:
    """The models that a recipe merges, by their names in it; of slices each once."""
    sources = [source for one in recipe.get("slices") or () for source in one.get("sources") or ()]
    given = [str(one.get("model") or one.get("task_vector")) for one in [*(recipe.get("models") or ()), *sources]]
    return list(dict.fromkeys(given)) if sources else given


def short_names(references: Sequence[str]) -> tuple[str, ...]:
    """The last part of each reference; more of it if that is not unique."""
    parts = [text.replace("+", "/").rstrip("/").removesuffix(".safetensors").split("/") for text in references]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return tuple(names)
    seen: Counter[str] = Counter()
    unique = []
    for reference in references:
        seen[reference] += 1
        unique.append(reference if seen[reference] == 1 else f"{reference} ({seen[reference]})")
    return tuple(unique)
