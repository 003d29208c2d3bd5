"""Models under the new base's tokens: rows of embeddings and heads that stand for the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mergebench.checkpoint import Model
from mergebench.checkpoint.chosen_rows import choose
from mergebench.checkpoint.content import tokenizer_hash
from mergebench.checkpoint.mismatch import few
from mergebench.checkpoint.names import is_vocabulary
from mergebench.errors import ModelError
from mergebench.recipe import tokenizers


def under_new_tokens(
    new: Model, models: Sequence[Model], wanted: Callable[[str], bool], changed: Callable[[str], bool]
) -> tuple[list[Model], list[str]]:
    """`models` (tuned, old) with the rows of the new base's tokens where numbers or ids differ, and notes.

    A token that one of the two lacks gets zeros in both: their difference is zero, and the new base keeps its row.
    changed: whether the patch may change a tensor; the tokens of one that it does not need no place. `ModelError` if
    rows have to move and cannot.
    """
    names = [name for name, info in new.tensors.items() if is_vocabulary(name) and info.is_float and wanted(name)]
    every = [new, *models]
    resized = [
        name for name in names for model in models
        if name in model.tensors and model.tensors[name].shape[1:] == new.tensors[name].shape[1:]
        and model.tensors[name].shape != new.tensors[name].shape
    ]  # fmt: skip
    places = [model.config_directory for model in every]
    if not resized and (None in places or len({tokenizer_hash(place) for place in places if place is not None}) == 1):
        return list(models), []
    try:
        vocabularies = [
            tokenizers.tokens_of(tokenizers.load(model.config_directory, model.reference)[0]) for model in every
        ]
    except ModelError as error:
        if not resized:
            return list(models), []  # nothing to compare, and nothing that shows a difference
        has = ", ".join(
            f"{one.reference} {one.tensors[resized[0]].shape[0]}" for one in every if resized[0] in one.tensors
        )
        what = f"{resized[0]}: other numbers of tokens ({has}), and {error.message}"
        raise ModelError(what, f"{error.hint}; or --exclude '{resized[0]}' keeps the new base's") from None
    moved = {token for one in vocabularies[1:] for token, row in one.items() if vocabularies[0].get(token, row) != row}
    lacking = [token for token in vocabularies[1] if token not in vocabularies[0]]
    if not resized and not moved:
        notes = [f"{len(lacking)} tokens of {models[0].reference} are not in {new.reference}'s tokenizer"]
        return list(models), notes if lacking else []
    if lacking and any(map(changed, names)):
        what = f"{models[0].reference} has {len(lacking)} tokens that {new.reference} does not have ({few(lacking)})"
        raise ModelError(what, f"add them to the new base first, or leave the tokens out: --exclude '{names[0]}' ...")
    moved_to = [_moved(model, new, names, _rows(vocabularies, number)) for number, model in enumerate(models, 1)]
    same = sum(all(token in one for one in vocabularies) for token in vocabularies[0])
    return moved_to, [f"rows of embeddings and heads are ported token by token: {same} tokens that all three have"]


def _rows(vocabularies: Sequence[Mapping[str, int]], number: int) -> dict[int, int]:
    """The rows of model `number` by rows of the new base, for the tokens that all have."""
    own = vocabularies[number]
    return {row: own[token] for token, row in vocabularies[0].items() if all(token in one for one in vocabularies)}


def _moved(model: Model, new: Model, names: Sequence[str], rows: Mapping[int, int]) -> Model:
    tensors = dict(model.tensors)
    for name in names:
        own, shape = model.tensors.get(name), new.tensors[name].shape
        if own is None or own.shape[1:] != shape[1:]:
            continue  # tied, or reported as a mismatch
        if name in model.deltas or own.is_quantized:
            why = "an adapter is on it" if name in model.deltas else f"it is stored as {own.dtype}"
            raise ModelError(f"{name}: {model.reference}'s tokens are others than {new.reference}'s, and {why}",
                             f"--exclude '{name}' keeps the new base's")  # fmt: skip
        chosen = np.full((1, shape[0]), -1, np.int64)
        for row, mine in rows.items():
            if row < shape[0] and mine < own.shape[0]:
                chosen[0, row] = mine
        tensors[name] = choose(own, [own], chosen, 0)
    return replace(model, tensors=tensors)
