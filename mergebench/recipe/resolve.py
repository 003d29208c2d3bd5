"""From a recipe to what the engine merges: models found and opened, the base in its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mergebench.checkpoint import Model, open_model
from mergebench.checkpoint.reference import locate
from mergebench.engine.merge import Merge
from mergebench.errors import MergebenchError
from mergebench.recipe.recipe import Entry, Recipe


def resolve(recipe: Recipe) -> Merge:
    """Open the recipe's models (headers only) and hand them to the engine, in recipe order.

    A base that is listed again among the models: methods on task vectors skip it (its task vector is
    zero), methods that take a fixed number of weights have it first, others count it where it stands.
    One that is not listed counts where the method says so, or takes a fixed number of weights.
    """
    method = recipe.method
    base = None if recipe.base_model is None else _open(recipe, Entry(recipe.base_model), ("base_model",))
    entries: list[tuple[Entry, Model]] = []
    for number, entry in enumerate(recipe.models):
        key = "model" if entry.model is not None else "task_vector"
        entries.append((entry, _open(recipe, entry, ("models", number, key))))
    if base is not None:
        listed = [pair for pair in entries if _same(pair[1], base)]
        others = [pair for pair in entries if not _same(pair[1], base)]
        if method.takes == "task_vectors":  # whose own would be zero
            entries = others
        elif method.models is not None or (method.base_counts and not listed):
            entries = [*(listed or [(Entry(recipe.base_model), base)]), *others]
    models = tuple(model for _, model in entries)
    return Merge(
        method=method,
        params=method.make_params(recipe.params([entry for entry, _ in entries])),
        base=base,
        models=models,
        names=short_names([model.reference for model in models]),
        scope=recipe.scope,
        include=recipe.include,
        exclude=recipe.exclude,
        seed=recipe.seed,
        dtype=recipe.out_dtype or recipe.dtype,
        recipe=recipe.to_dict(),
    )


def short_names(references: Sequence[str]) -> tuple[str, ...]:
    """The last part of each reference; more of it where that is not unique."""
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


def folders(recipe: Recipe) -> list[Path]:
    """Where relative paths are looked up after the working directory."""
    return [] if recipe.folder is None else [recipe.folder]


def _open(recipe: Recipe, entry: Entry, loc: tuple[str | int, ...]) -> Model:
    reference = entry.model if entry.model is not None else entry.task_vector
    assert reference is not None, "a checked entry names a model or a task vector"
    try:
        locate(reference, folders(recipe))
    except MergebenchError as error:  # what is not there is the recipe's matter: say where it is named
        raise type(error)(f"{recipe.where(*loc)}: {error.message}", error.hint) from None
    return open_model(reference, folders=folders(recipe), task_vector=entry.task_vector is not None)


def _same(model: Model, base: Model) -> bool:
    places = [(one.directory or one.headers[0].file).resolve() for one in (model, base)]
    return places[0] == places[1] and not model.low_rank and not model.is_task_vector
