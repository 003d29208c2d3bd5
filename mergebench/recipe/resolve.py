"""Turn a recipe into the engine's `Merge`: find and open models, and put the base in its place."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergebench.checkpoint import Model, adopt
from mergebench.checkpoint.align import with_head
from mergebench.checkpoint.header import ENCODINGS
from mergebench.checkpoint.measured import MAKE, Measured, read_measured_of
from mergebench.checkpoint.names import layer_of
from mergebench.checkpoint.reference import looked_in
from mergebench.engine.job import Merge
from mergebench.engine.lines import Lines
from mergebench.errors import MergebenchError, RecipeError
from mergebench.recipe.averaging import Entry
from mergebench.recipe.gradients import depths
from mergebench.recipe.modules import check_parts
from mergebench.recipe.notes import (
    about_configs,
    about_files,
    about_gradients,
    about_heads,
    about_no_config,
    about_slices,
    about_the_base,
)
from mergebench.recipe.open import folders, open_named, short_names
from mergebench.recipe.padding import share_padding
from mergebench.recipe.positions import Loc, dotted
from mergebench.recipe.recipe import Recipe
from mergebench.recipe.slices import pieces_of, put_together, take_apart
from mergebench.recipe.yaml import find


def resolve(recipe: Recipe) -> Merge:
    """Open the recipe's models (headers only) and hand them to the engine, in recipe order.

    If the base is also listed among the models: methods on task vectors skip it (its task vector is zero), methods that
    take a fixed number of weights have it first, and others count it in its place. A base that is not listed counts as
    a model if the method says so, or takes a fixed number of weights.
    """
    merge = _resolve(recipe)
    method, cut = merge.method, merge.cut
    if merge.scope == "model" != method.scope and cut != "element":
        raise recipe.places.error(("scope",), f"'{method.name}' works on one {cut} at a time", "take out scope: model")
    if recipe.lines is None:
        return merge
    if recipe.lines.alpha is None and cut == "row":
        what = f"auto needs sums over the model, '{method.name}' is cut into rows"
        raise recipe.places.error(("lines", "alpha"), what, "give it a number")
    lines = Lines(recipe.lines.alpha, recipe.lines.beta, depths(merge.reference.tensors))
    return replace(merge, method=lines.around(method), lines=lines)


def _resolve(recipe: Recipe) -> Merge:
    opened = open_all(recipe)
    statistics = [_open_statistics(recipe, number, *pair) for number, pair in enumerate(opened[1])]
    check_parts(recipe.parts, (opened[0] or opened[1][0][1]).tensors, recipe.places)
    base, entries = _with_tokens(recipe, *_under_one_name(recipe, *opened))
    models = [model for _, model in entries]
    merge = _sliced(recipe, base, models) if recipe.slices else _whole(recipe, base, entries, statistics)
    first = base if base is not None else models[0]
    notes = about_configs(first, models, merge.wanted) + about_no_config(merge.reference)
    notes += about_files(first, models, recipe.chat_template is not None)
    return replace(merge, notes=merge.notes + notes)


def _whole(
    recipe: Recipe, base: Model | None, entries: list[tuple[Entry, Model]], statistics: Sequence[Measured | None]
) -> Merge:
    """Models merged whole, the base in its place among them; statistics: of the recipe's models."""
    method, notes = recipe.method, recipe.notes
    if base is not None:
        listed = [pair for pair in entries if _same(pair[1], base)]
        others = [pair for pair in entries if not _same(pair[1], base)]
        if method.takes == "task_vectors":  # the base's own would be zero
            entries = others
            notes += about_the_base(recipe, [entry for entry, _ in listed])
        elif method.models is not None or (method.base_counts and not listed):
            entries = [*(listed or [(Entry(recipe.base_model), base)]), *others]
    models = tuple(model for _, model in entries)
    merge = _merge(recipe, notes, base, models, method.make_params(recipe.params([entry for entry, _ in entries])))
    merge = replace(merge, notes=merge.notes + about_heads(merge))
    own = [entry for entry, _ in entries]
    if method.statistics is not None:
        read = [statistics[recipe.models.index(entry)] for entry in own]
        data = tuple(recipe.models.index(entry) for entry in own if entry.data is not None)
        merge = replace(merge, statistics=tuple(one for one in read if one is not None), data=data)
    if not recipe.varies:
        return merge
    depth = depths(merge.reference.tensors)
    merged = [name for name, info in merge.reference.tensors.items() if info.is_float and merge.wanted(name)]
    values = {name: recipe.params(own, name, depth.get(name, 0.0)) for name in merged}
    gradients = about_gradients(merged, lambda name, depth: recipe.params(own, name, depth))
    return _varying(replace(merge, notes=merge.notes + gradients), values)


def open_all(recipe: Recipe) -> tuple[Model | None, list[tuple[Entry, Model]]]:
    """The base and every model that the recipe names, as stored on disk."""
    base = None if recipe.base_model is None else _open(recipe, Entry(recipe.base_model), ("base_model",))
    entries: list[tuple[Entry, Model]] = []
    for number, entry in enumerate(recipe.models):
        loc: Loc = ("models", number, "model" if entry.model is not None else "task_vector")
        if recipe.slices:
            loc = next(
                ("slices", i, "sources", k, "model")
                for i, one in enumerate(recipe.slices)
                for k, source in enumerate(one.sources)
                if source.model == entry.model
            )
        entries.append((entry, _open(recipe, entry, loc)))
    return base, entries


def _under_one_name(
    recipe: Recipe, base: Model | None, entries: list[tuple[Entry, Model]]
) -> tuple[Model | None, list[tuple[Entry, Model]]]:
    """The models with their tensors under the base's names; a head that only some tie to the embedding is apart."""
    if recipe.slices:  # slices name layers, numbered as in each model
        named = {source.model for one in (recipe.slices[0], recipe.slices[-1]) for source in one.sources}
        ends = [model for entry, model in entries if entry.model in named]
        return base and with_head(base, ends), [(entry, with_head(model, ends)) for entry, model in entries]
    reference = base if base is not None else entries[0][1]
    adopted = [(entry, adopt(reference, model)) for entry, model in entries]
    headed = with_head(reference, [model for _, model in adopted])
    if base is None:
        return None, [(adopted[0][0], headed), *adopted[1:]]
    return headed, [(entry, headed if _same(model, base) else model) for entry, model in adopted]


def _with_tokens(
    recipe: Recipe, base: Model | None, entries: list[tuple[Entry, Model]]
) -> tuple[Model | None, list[tuple[Entry, Model]]]:
    """The models under the vocabulary, and with the chat template, that the recipe asks for."""
    models = {} if base is None else {_key(base): base}  # a base listed twice is one model
    for _, model in entries:
        models.setdefault(_key(model), model)
    changed = list(models.values()) if recipe.vocabulary is not None else share_padding(list(models.values()))
    if recipe.vocabulary is not None or recipe.chat_template is not None:
        from mergebench.recipe.vocabulary import share_vocabulary  # this import loads torch

        changed = share_vocabulary(recipe, changed)
    shared = dict(zip(models, changed, strict=True))
    return base and shared[_key(base)], [(entry, shared[_key(model)]) for entry, model in entries]


def _key(model: Model) -> tuple[Path, tuple[Path, ...], bool, int]:
    """Equal for models of one reference, however it is written, if none or each is `as_trained`."""
    place = (model.directory or model.headers[0].file).resolve()
    adapters = tuple(adapter.resolve() for adapter in model.adapters)
    return place, adapters, model.is_task_vector, sum(map(len, model.deltas.values()))


def _merge(
    recipe: Recipe,
    notes: tuple[str, ...],
    base: Model | None,
    models: Sequence[Model],
    params: Any,
    names: Sequence[str] = (),
) -> Merge:
    names = tuple(names) or short_names([model.reference for model in models])
    named = [
        *zip(names, models, strict=True),
        *([] if base is None or any(_same(one, base) for one in models) else [("base", base)]),
    ]
    remarks = [f"{name}: {remark}" for name, model in named for remark in model.remarks]
    return Merge(
        method=recipe.method,
        params=params,
        base=base,
        models=tuple(models),
        names=names,
        scope=recipe.scope,
        include=recipe.include,
        exclude=recipe.exclude,
        seed=recipe.seed,
        dtype=recipe.dtype if recipe.out_dtype in (None, *ENCODINGS) else recipe.out_dtype,
        encoding=recipe.out_dtype if recipe.out_dtype in ENCODINGS else None,
        recipe=recipe.to_dict(),
        folders=tuple(str(folder.resolve()) for folder in [Path(), *folders(recipe)]),
        notes=(*notes, *remarks),
    )


def _varying(merge: Merge, values: Mapping[str, dict[str, Any]]) -> Merge:
    """The merge with parameters for each tensor; equal ones are one object."""
    if not values:  # the plan refuses it
        return merge
    made: dict[tuple[Any, ...], Any] = {}
    by_tensor = {}
    for name, given in values.items():
        key = tuple(given.values())
        if key not in made:
            made[key] = merge.method.make_params(given)
        by_tensor[name] = made[key]
    return replace(merge, params=next(iter(made.values())), by_tensor=by_tensor)


def _sliced(recipe: Recipe, base: Model | None, models: Sequence[Model]) -> Merge:
    """Models composed of slices; the base's layers come from the source that names the base."""
    opened = {str(entry.model): model for entry, model in zip(recipe.models, models, strict=True)}
    method, slices = recipe.method, recipe.slices
    stacks = take_apart(slices, opened, lambda *loc: f"{recipe.where(*loc)}: {dotted(loc)}")
    pieces = pieces_of(slices, stacks)
    most = max(len(one.sources) for one in slices)
    alone = {number for number, one in enumerate(slices) if len(one.sources) < most}  # one source: copied
    rows, places = [], []  # of the models and of the base, among the sources
    for number, one in enumerate(slices):
        row = list(range(len(one.sources)))
        if base is not None:
            found = [at for at in row if number in alone or _same(opened[one.sources[at].model], base)]
            if len(found) != 1:
                where = recipe.where("slices", number, "sources")
                raise RecipeError(f"{where}: the base_model must be one of the sources: which of its layers is meant?")
            places += found
            others = [at for at in row if at not in found]
            if method.takes == "task_vectors":  # its own would be zero
                row = others
            elif method.models is not None:
                row = [*found, *others]
        rows.append(row)
    width = max(map(len, rows))
    rows = [[0] * width if number in alone else row for number, row in enumerate(rows)]
    whole_base = None if base is None else put_together(pieces, slices, places, stacks)

    def params(name: str, depth: float) -> dict[str, Any]:
        piece = pieces[name]
        names = {at: piece.names[at] for at in rows[piece.slice]}
        return recipe.slice_params(piece.slice, names, name, depth)

    merged = {name: piece for name, piece in pieces.items() if piece.slice not in alone}
    values = {name: params(name, piece.depth) for name, piece in merged.items()}
    columns = [put_together(pieces, slices, column, stacks) for column in zip(*rows, strict=True)]
    notes = (
        *recipe.notes,
        *about_slices(recipe, pieces, columns[0].config.get("model_type"), alone),
        *about_gradients(merged, params),
    )
    short = dict(zip(opened, short_names([model.reference for model in models]), strict=True))
    labels = []
    for column in zip(*rows, strict=True):
        used = (short[one.sources[at].model] for one, at in zip(slices, column, strict=True))
        labels.append("|".join(dict.fromkeys(used)))
    merge = _merge(recipe, notes, whole_base, columns, None, labels)
    layers = {name: layer_of(name) for name in pieces if name not in merged}
    copied = [glob.escape(f"{at[0]}.{at[1]}." if at else name) + "*" * (at is not None) for name, at in layers.items()]
    return _varying(replace(merge, exclude=(*merge.exclude, *dict.fromkeys(copied))), values)


def _open(recipe: Recipe, entry: Entry, loc: Loc) -> Model:
    reference = entry.model if entry.model is not None else entry.task_vector
    assert reference is not None, "a checked entry names a model or a task vector"
    model = open_named(recipe, reference, loc, task_vector=entry.task_vector is not None)
    if entry.as_trained is None:
        return model
    from mergebench.adapters.as_trained import as_trained  # this import loads torch

    return as_trained(model)


def _same(model: Model, base: Model) -> bool:
    """Whether a model is the base, listed again."""
    return not model.is_task_vector and _key(model) == _key(base)


def _open_statistics(recipe: Recipe, number: int, entry: Entry, model: Model) -> Measured | None:
    """The statistics that a model of the recipe names; None if it names data."""
    kind = recipe.method.statistics
    if kind is None or entry.statistics is None:
        return None
    try:
        text, places = entry.statistics, folders(recipe)
        place = find(text, places, folder=True) or find(text, places)
        if place is None:
            raise RecipeError(f"no such file or folder: {text}", looked_in(text, places) or MAKE)
        return read_measured_of(place, model, kind, recipe.method.name)
    except MergebenchError as error:
        where = recipe.where("models", number, "statistics")
        raise type(error)(f"{where}: {error.message}", error.hint) from None
