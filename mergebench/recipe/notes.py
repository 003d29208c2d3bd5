"""Notes on what a recipe may do unexpectedly, a line each, for people and for provenance."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mergebench.checkpoint import Model
from mergebench.checkpoint.align import Ties
from mergebench.checkpoint.beside import other_files
from mergebench.checkpoint.configs import check_heads, disagreement
from mergebench.checkpoint.distributed import SHARD
from mergebench.checkpoint.names import is_vocabulary, layer_of
from mergebench.engine.job import Merge
from mergebench.recipe.averaging import Entry
from mergebench.recipe.ends import comes_before
from mergebench.recipe.open import short_names
from mergebench.recipe.recipe import Recipe

SHOWN = 3  # names in a note


def about_gradients(names: Iterable[str], params: Callable[[str, float], dict[str, Any]]) -> tuple[str, ...]:
    """Note the tensors after the layers that get a gradient's first value; `params(name, depth)` gives the
    parameters."""
    after = [name for name in names if layer_of(name) is None and not comes_before(name)]
    found = [name for name in after if params(name, 0.0) != params(name, 1.0)]
    what = "after the layers, yet a gradient's first value holds, as in mergekit; set it by {filter, value}"
    return (f"{_few(found)}: {what}",) if found else ()


def about_slices(recipe: Recipe, names: Iterable[str], model_type: Any, alone: Iterable[int]) -> tuple[str, ...]:
    """Note slices of one source beside slices of several, and tensors that may come before the layers or after them."""
    places = [recipe.where("slices", number) for number in sorted(alone)]
    found = [name for name in names if layer_of(name) is None and comes_before(name, model_type) is None]
    notes = [f"{', '.join(places)}: one source, so its tensors are copied, whatever its parameters"] if places else []
    if found:
        notes.append(f"{_few(found)}: before the layers or after them? Taken from the last slice, as what comes after")
    return tuple(notes)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def about_configs(base: Model, models: Sequence[Model], wanted: Callable[[str], bool]) -> tuple[str, ...]:
    """Note what the models' configs say otherwise than the base's; `ModelError` if they cut the same matrices into
    other heads."""
    notes = {}
    for name, model in zip(short_names([model.reference for model in models]), models, strict=True):
        check_heads(base, model, wanted)
        notes[name] = disagreement(base, model)
    return tuple(f"{name}: {note}" for name, note in notes.items() if note is not None)


def about_no_config(reference: Model) -> tuple[str, ...]:
    """Note that the result will not load, because nothing beside the shards of a run says what model it is."""
    shards = any(header.file.suffix == SHARD for header in reference.headers)
    what = "no config.json lies beside these shards, so the result has none; name the model they began as: base_model"
    return (f"{reference.reference}: {what}",) if shards and not reference.config else ()


def about_files(base: Model, models: Sequence[Model], chosen: bool) -> tuple[str, ...]:
    """Note the files beside the weights that differ from the base's; chosen: whether the recipe names a template."""
    named = zip(short_names([model.reference for model in models]), models, strict=True)
    notes = {name: other_files(base, model, chosen) for name, model in named}
    return tuple(f"{name}: {note}" for name, note in notes.items() if note is not None)


def about_heads(merge: Merge) -> tuple[str, ...]:
    """Note the heads of models' own, which the base does not have and `include` does not name."""
    found = []
    for label, model in zip(merge.names, merge.models, strict=True):
        ties = Ties(model)
        for name in model.tensors.keys() - merge.reference.tensors.keys():
            excluded = any(fnmatch.fnmatchcase(name, glob) for glob in merge.exclude)
            if is_vocabulary(name) and not excluded and not merge.wanted(name) and ties.target(name) is None:
                found.append(f"{label}: {name}: a head of its own, which include leaves out; the result has the base's")
    return tuple(sorted(found))


def about_the_base(recipe: Recipe, skipped: Sequence[Entry]) -> tuple[str, ...]:
    """Note the parameters of a base that is listed among the models and skipped."""
    given = [entry for entry in skipped if entry.parameters]
    if not given:
        return ()
    place = recipe.where("models", recipe.models.index(given[0]), "parameters")
    names = ", ".join(given[0].parameters)
    return (f"{place}: {names}: not used, the model is the base and '{recipe.merge_method}' merges differences to it",)
