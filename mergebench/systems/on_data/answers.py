"""How a model answers a text: its classes, by a head of the task or its own, or the next token at every place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mergebench.checkpoint.model import Model
from mergebench.errors import ModelError, RunError, did_you_mean
from mergebench.evaluation.head import Head, read_head
from mergebench.networks.network import Network
from mergebench.systems.on_data.settings import Settings
from mergebench.systems.on_data.texts import Data

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "head.safetensors"
LONGEST = 512  # tokens of a text, where nothing says it
_OWN = {"ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM"}
_OWN["ForSequenceClassification"] = "AutoModelForSequenceClassification"


@dataclass(frozen=True)
class Answers:
    """How a model is asked; made by `answers_of`."""

    auto_class: str
    head: Head | None
    max_length: int

    @property
    def next_tokens(self) -> bool:
        return self.auto_class == "AutoModelForCausalLM"

    def logits(self, network: Network, tokens: Sequence[Sequence[int]]) -> Tensor:
        """[items, classes] of texts, or [tokens, vocabulary]: of every token but a text's first, from those before."""
        ids, mask = network.padded(tokens)
        if self.head is not None:
            head, device = self.head, network.device
            rows = head.pooling.scaled(head.pooling(network.last_states(ids, mask), mask))
            return rows @ head.weight.to(device).T + head.bias.to(device)
        logits: Tensor = network.module(input_ids=ids, attention_mask=mask).logits
        return logits[:, :-1][mask[:, 1:].bool()] if self.next_tokens else logits

    def true(self, network: Network, data: Data, tokens: Sequence[Sequence[int]], positions: Sequence[int]) -> Tensor:
        """The right class of each row of `logits`: the labels of the data, or the texts' own next tokens."""
        if self.next_tokens:
            return torch.tensor([one for ids in tokens for one in ids[1:]], device=network.device)
        labels = self.head.labels if self.head is not None else _own_labels(network)
        found = []
        for position in positions:
            label = str(data.labels[position])
            if label not in labels:
                hint = did_you_mean(label, labels)
                raise RunError(f"{data.rows[position].where}: label '{label:.60}' is no class of {network.name}", hint)
            found.append(labels.index(label))
        return torch.tensor(found, device=network.device)


def answers_of(model: Model, settings: Settings) -> Answers:
    """How this model is asked: by the task's head if it has one, else by its own; `ModelError` if it has none."""
    file = settings.head
    own = model.own_directory()
    if file is None and own is not None and own.is_dir() and (own / HEAD).is_file():
        file = own / HEAD
    if file is not None:
        head = read_head(Path(file))
        return Answers("AutoModel", head, settings.max_length or head.max_length or LONGEST)
    kind = str((model.config.get("architectures") or [""])[0])
    auto_class = next((auto for end, auto in _OWN.items() if kind.endswith(end)), None)
    if auto_class is None:
        what = f"model '{model.reference}': it has no head, and a {kind or 'model'} answers nothing without one"
        raise ModelError(what, "give the task's: --head FILE, in a recipe data: {file: FILE, head: FILE}")
    return Answers(auto_class, None, settings.max_length or LONGEST)


def needs_labels(model: Model, kind: str, settings: Settings) -> bool:
    """Whether statistics of this kind read the labels of the data; a language model's are in the texts."""
    return kind == "fisher" and settings.labels == "true" and not answers_of(model, settings).next_tokens


def _own_labels(network: Network) -> tuple[str, ...]:
    named = getattr(network.module.config, "id2label", None) or {}
    return tuple(str(named[number]) for number in sorted(named))
