"""Embeddings and heads of one tokenizer that are padded to different lengths.

Rows past the tokenizer's last token belong to no token. The result has as many as the base, and the base's values in
them: a longer model's are left out, a shorter model has the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mergebench.checkpoint import Model, TensorInfo
from mergebench.checkpoint.header import FP8
from mergebench.checkpoint.names import is_vocabulary
from mergebench.errors import ModelError
from mergebench.recipe import tokenizers


def share_padding(models: Sequence[Model]) -> list[Model]:
    """The models with as many rows for tokens as the first, where their tokenizers have the same tokens."""
    base, *others = models
    return [base, *(_padded(base, model) for model in others)]


def _padded(base: Model, model: Model) -> Model:
    wanted = {
        name: (info, base.tensors[name])
        for name, info in model.tensors.items()
        if is_vocabulary(name) and name in base.tensors and _differ(info, base.tensors[name])
    }
    if not wanted or model.is_task_vector or wanted.keys() & model.deltas.keys():
        return model
    count = _tokens(base, model)
    if count is None or any(count > min(own.shape[0], of.shape[0]) for own, of in wanted.values()):
        return model
    from mergebench.checkpoint.chosen_rows import choose  # this import loads torch

    tensors = dict(model.tensors)
    for name, (own, of) in wanted.items():
        rows, there = np.arange(of.shape[0]), own.shape[0]
        from_base = np.where(rows < there, -1, rows)
        if (from_base >= 0).any():
            tensors[name] = choose(own, [own, of], np.stack([np.where(rows < there, rows, -1), from_base]), 0)
        else:
            tensors[name] = choose(own, [own], rows[None], 0)
    own, of = next(iter(wanted.values()))
    what = f"{own.shape[0]} rows for {count} tokens, {of.shape[0]} in base"
    done = (
        "those past the tokens are the base's" if own.shape[0] < of.shape[0] else "those past the base's are left out"
    )
    return replace(model, tensors=tensors, remarks=(*model.remarks, f"{what}: {done}"))


def _differ(one: TensorInfo, other: TensorInfo) -> bool:
    alike = one.shape[1:] == other.shape[1:] and not {one.dtype, other.dtype} & FP8
    return alike and one.is_float and other.is_float and one.shape != other.shape


def _tokens(base: Model, model: Model) -> int | None:
    """The number of rows that their tokens need; None if they have other tokens, or nothing tells."""
    try:
        ours, theirs = (_vocabulary(one) for one in (base, model))
    except ModelError:
        return None
    return max(ours.values(), default=-1) + 1 if ours == theirs else None


def _vocabulary(model: Model) -> dict[str, int]:
    """The tokens of a model by its tokenizer.json, which decides, and their ids."""
    from tokenizers import Tokenizer

    try:
        return dict(Tokenizer.from_file(str(model.side_directory / "tokenizer.json")).get_vocab())
    except Exception:  # none, or damaged: any error of the library
        return tokenizers.tokens_of(tokenizers.load(model.config_directory, model.reference)[0])
