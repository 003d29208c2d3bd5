"""Models under one vocabulary: choose the rows of each embedding and head for the output's tokens.

A token that a model lacks gets the base's row, else the row of the only model that has it, else the mean of the models
that have it; a token that no model has is zero. This uses headers and tokenizer files alone, as in mergekit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergebench.checkpoint import Model, TensorInfo
from mergebench.checkpoint.align import Ties
from mergebench.checkpoint.chosen_rows import choose
from mergebench.checkpoint.names import is_vocabulary, layer_of
from mergebench.checkpoint.side_files import GENERATION
from mergebench.errors import RecipeError, did_you_mean
from mergebench.recipe import tokenizers
from mergebench.recipe.open import locate_named
from mergebench.recipe.positions import Loc
from mergebench.recipe.recipe import Recipe
from mergebench.recipe.tokens import TokenSource, Vocabulary

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """The output's tokens: their number of rows, and the place of each in each model."""

    count: int
    padding: int
    have: Ids  # [models, count]: the model's row of each token, -1 if it has none
    rows: list[Ids]  # for each model [models, count]: the rows that are averaged to its row, -1 for none


def share_vocabulary(recipe: Recipe, models: Sequence[Model]) -> list[Model]:
    """The models with embeddings and heads of the output's tokens; `models[0]` gives config and tokenizer."""
    wanted, template = recipe.vocabulary, recipe.chat_template
    files = None
    changed = list(models)
    if wanted is not None:
        for model in models:
            if model.is_task_vector:
                raise RecipeError(
                    f"tokenizer: task vector '{model.reference}' has no tokens of its own",
                    "name the model it belongs to with model:",
                )
        loaded = [tokenizers.load(model.config_directory, model.reference) for model in models]
        tokens, files = _tokens(recipe, wanted, models, [tokenizer for tokenizer, _ in loaded])
        changed = [
            model if remark is None else replace(model, remarks=(*model.remarks, remark))
            for model, (_, remark) in zip(_remap(models, tokens), loaded, strict=True)
        ]
        size = tokens.count + tokens.padding
        rows = _rows(models[0])
        if rows is not None and rows != size:
            remark = f"{rows} rows for tokens become {size}: the tokenizer has {tokens.count} tokens"
            changed[0] = replace(changed[0], remarks=(*changed[0].remarks, remark))
        changes = tokenizers.with_vocab_size(models[0].config, size)
        if changes:
            changed[0] = replace(changed[0], config_changes=changes)
    source = models[0]
    if template == "auto":
        template, source = tokenizers.usual_template(models) or (None, source)
    if template is not None and models[0].config_directory is not None:
        files = tokenizers.with_template(files or tokenizers.stored(models[0].config_directory), template)
        if source is not models[0] and source.config_directory is not None:  # turns end by the tokens named there
            ends = tokenizers.taken(source.config_directory, source.config_directory.glob(GENERATION))
            files |= ends
            remark = f"{' and '.join(['the chat template', *ends])}: those of {source.reference}"
            changed[0] = replace(changed[0], remarks=(*changed[0].remarks, remark))
    changed[0] = replace(changed[0], tokenizer_files=files)
    return changed


def _tokens(
    recipe: Recipe, wanted: Vocabulary, models: Sequence[Model], loaded: Sequence[Any]
) -> tuple[Tokens, dict[str, bytes] | None]:
    """The output's tokens, and its tokenizer's files if they are not the first model's; loaded: the models'
    tokenizers."""
    sizes = [_rows(model) for model in models]
    base = tokenizers.without_unused(original := loaded[0], sizes[0], models[0].reference)
    each = [base, *loaded[1:]]
    vocabularies = [tokenizers.tokens_of(tokenizer) for tokenizer in each]
    place = models[0].config_directory
    if wanted.source == "base":
        out = base
        files = None if base is original else tokenizers.saved(base, place)
    elif wanted.source == "union":
        out = tokenizers.union(base, each, sizes)
        files = None if out is original else tokenizers.saved(out, place)
    else:
        place = _find(recipe, wanted.source)
        out, _ = tokenizers.load(place if place.is_dir() else None, wanted.source)
        files = tokenizers.stored(place)
    known = out.get_vocab()
    new = [token for token in wanted.tokens if token not in known]
    if new:
        out.add_tokens(new)
        files = tokenizers.saved(out, place)
    ids = tokenizers.tokens_of(out)
    count = max(len(ids), max(ids.values(), default=-1) + 1)  # ids may have gaps, whose rows are zero
    have = np.full((len(models), count), -1, np.int64)
    places = np.fromiter(ids.values(), np.int64, len(ids))
    for number, vocabulary in enumerate(vocabularies):
        own = np.fromiter((vocabulary.get(token, -1) for token in ids), np.int64, len(ids))
        size = sizes[number]
        have[number, places] = own if size is None else np.where(own < size, own, -1)  # larger ids have no row
    rows = _rows_of(recipe, wanted, models, vocabularies, ids, have)
    padding = -count % wanted.pad_to_multiple_of if wanted.pad_to_multiple_of else 0
    return Tokens(count, padding, have, rows), files


def _find(recipe: Recipe, source: str) -> Path:
    """The directory of the model whose tokenizer is wanted."""
    loc = ("tokenizer_source",) if ("tokenizer_source",) in recipe.places.texts else ("tokenizer", "source")
    return locate_named(recipe, source, loc).checkpoint


def _rows_of(
    recipe: Recipe,
    wanted: Vocabulary,
    models: Sequence[Model],
    vocabularies: Sequence[dict[str, int]],
    ids: dict[str, int],
    have: Ids,
) -> list[Ids]:
    """For each model, the rows that are averaged to its rows."""
    lacking = have.copy()  # where a row comes from in models that lack the token: the mean of all that have it,
    if recipe.base_model is not None:  # or the base's
        lacking[1:, have[0] >= 0] = -1
    forced = np.zeros(have.shape[1], bool)
    for token, source in wanted.tokens.items():
        place = ids[token]
        forced[place] = source.force
        lacking[:, place] = -1
        if source.model is not None and (source.force or (have[:, place] < 0).any()):
            number, row = _row(recipe, models, vocabularies, have, token, place, source)
            lacking[number, place] = row
    found = []
    for number in range(len(models)):
        keeps = (have[number] >= 0) & ~forced
        rows = np.where(keeps, -1, lacking)
        rows[number, keeps] = have[number, keeps]
        found.append(rows)
    return found


def _row(
    recipe: Recipe,
    models: Sequence[Model],
    vocabularies: Sequence[dict[str, int]],
    have: Ids,
    token: str,
    place: int,
    source: TokenSource,
) -> tuple[int, int]:
    """The model and the row that a token's source names."""
    loc: Loc = ("tokenizer", "tokens", token, "source")
    names = [model.reference for model in models]
    if source.model not in names:
        hint = did_you_mean(str(source.model), names) or "name it under models"
        raise recipe.places.error(loc, f"'{source.model}' is no model of this recipe", hint)
    number = names.index(source.model)
    if source.token_id is not None:
        size = _rows(models[number])
        if size is not None and source.token_id >= size:
            raise recipe.places.error(loc, f"'{source.model}' has {size} tokens, the last is {size - 1}")
        return number, source.token_id
    row = int(have[number, place])
    wants = source.token or token
    if source.token is not None:
        row = vocabularies[number].get(wants, -1)
        size = _rows(models[number])
        row = -1 if size is not None and row >= size else row
    if row < 0:
        near = did_you_mean(wants, list(vocabularies[number])) if len(vocabularies[number]) < 10_000 else None
        raise recipe.places.error(loc, f"'{source.model}' has no token '{wants}'", near)
    return number, row


def _rows(model: Model) -> int | None:
    """The number of tokens with a row in a model: as in its config, or fewer if its files hold fewer."""
    size = tokenizers.vocab_size(model.config)
    rows = [info.shape[0] for name, info in model.tensors.items() if is_vocabulary(name) and info.shape]
    return min([*rows, *([] if size is None else [size])], default=None)


def _remap(models: Sequence[Model], tokens: Tokens) -> list[Model]:
    """The models with new rows for embeddings and heads."""
    changed = [dict(model.tensors) for model in models]
    for name in _candidates(models):
        stored = [_stored(model, name) for model in models]
        shapes = {info.shape[1:] for info in stored if info is not None}
        if len(shapes) > 1:
            continue  # these models do not fit together; reported when all are compared with the base
        for number, model in enumerate(models):
            own = model.tensors.get(name)
            if own is None:
                continue
            if name in model.deltas:
                raise RecipeError(
                    f"tokenizer: {name}: '{model.reference}' has an adapter on it, which is not supported yet",
                    "merge the adapter into its model first, or leave tokenizer out",
                )
            if own.is_quantized:
                raise RecipeError(
                    f"tokenizer: {name}: '{model.reference}' stores it as {own.dtype}, which is not supported yet",
                    "leave tokenizer out, or convert the model to bfloat16 first",
                )
            used = [(info, rows) for info, rows in zip(stored, tokens.rows[number], strict=True) if info is not None]
            lost = any(
                (rows >= 0).any() for info, rows in zip(stored, tokens.rows[number], strict=True) if info is None
            )
            if lost:
                raise RecipeError(f"tokenizer: {name}: not every model has it, and tokens need its rows")
            chosen = np.stack([rows for _, rows in used])
            changed[number][name] = choose(own, [info for info, _ in used], chosen, tokens.padding)
    return [replace(model, tensors=tensors) for model, tensors in zip(models, changed, strict=True)]


def _candidates(models: Sequence[Model]) -> list[str]:
    """Tensors with a row for each token: embeddings and heads by their names, or as long as the vocabulary."""
    found = []
    for name in dict.fromkeys(name for model in models for name in model.tensors):
        having = [(model, model.tensors[name]) for model in models if name in model.tensors]
        if not all(info.is_float and info.shape for _, info in having):
            continue
        if is_vocabulary(name) or (layer_of(name) is None and all(_as_long(model, info) for model, info in having)):
            found.append(name)
    return found


def _as_long(model: Model, info: TensorInfo) -> bool:
    size = tokenizers.vocab_size(model.config)
    return info.shape[0] == size and size != model.config.get("hidden_size") and len(info.shape) == 2


def _stored(model: Model, name: str) -> TensorInfo | None:
    """The tensor in a model; a head that is not stored is the embedding it is tied to."""
    return model.tensors.get(name) or Ties(model).tensor(name)


__all__ = ["share_vocabulary"]
