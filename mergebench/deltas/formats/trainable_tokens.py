"""Trainable tokens as PEFT saves them: some rows of an embedding, [tokens, width], numbered in the config.

If the model ties its head to the embedding, the rows are saved for both. Most such bases store only the embedding; one
that also stores the head gets the rows in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mergebench.checkpoint.files import Files, whole
from mergebench.checkpoint.format import Base
from mergebench.checkpoint.header import TensorInfo
from mergebench.deltas.peft.directory import CONFIG
from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.deltas.peft.names import Names
from mergebench.deltas.replaced_rows import replaced_rows
from mergebench.errors import ModelError

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)$")


def _check(directory: Path, config: Mapping[str, Any]) -> None:
    tokens = config.get("token_indices")
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        raise ModelError(f"{directory / CONFIG}: token_indices must be numbers of tokens")


def _select(directory: Path, modules: dict[str, dict[str, TensorInfo]], base: Base) -> dict[str, dict[str, TensorInfo]]:
    """The modules that the base stores, with the head if that is tied and stored."""
    names = Names(directory, base.tensors, {f"{module}.weight": None for module in modules})
    kept: dict[str, dict[str, TensorInfo]] = {}
    copies: dict[str, ModelError] = {}
    for module in modules:
        try:
            names.find(f"{module}.weight")
            kept[module] = modules[module]
        except ModelError as missing:
            copies[module] = missing
    with Files() as files:
        for module, error in copies.items():
            rows = whole(files, modules[module]["rows"])
            if not any(torch.equal(rows, whole(files, parts["rows"])) for parts in kept.values()):
                raise error
    if base.config.get("tie_word_embeddings") is True:
        embeddings = [parts for module, parts in kept.items() if not _HEAD.search(module)]
        if not embeddings:
            raise ModelError(f"{directory}: it changes the head alone, which the base ties to the embedding")
        heads = [name.removesuffix(".weight") for name in base.tensors if _HEAD.search(name.removesuffix(".weight"))]
        if heads and len(embeddings) == 1 and not any(_HEAD.search(module) for module in kept):
            kept[heads[0]] = embeddings[0]
    return kept


@peft_type("TRAINABLE_TOKENS", rows="trainable_tokens_delta", check=_check, select=_select)
def trainable_tokens(module: Module) -> Iterator[Change]:
    """The rows of an embedding or a head that are replaced."""
    tokens = tuple(module.config["token_indices"])
    yield Change(replaced_rows, {"values": module.part("rows", len(tokens), None)}, {"tokens": tokens})
