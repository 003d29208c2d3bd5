"""Completion: a causal language model writes the completion of a prompt."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergebench.errors import RunError
from mergebench.evaluation.task import Prediction, accuracy
from mergebench.networks.batch import batches
from mergebench.networks.items import Row, contents, read_rows, some
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.parameters import param
from mergebench.training.task import PARTS, Common, Head, Measured, Rows, TrainingTask, keep_apart, training_task

TOKENS = 2048  # of a batch that is measured


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    """Prompts with completions."""

    prompt: str = param("prompt", "the column with the prompt; it may be empty")
    completion: str = param("completion", "the column with what should be written")
    max_length: int = param(256, "tokens of prompt and completion; a longer prompt loses its beginning", low=4)


class _Items:
    """The items of one part, and their tokens with each tokenizer."""

    def __init__(self, rows: Sequence[Row], max_length: int) -> None:
        self.rows, self.max_length = rows, max_length
        self._tokens: dict[str, list[tuple[list[int], list[int]]]] = {}

    def tokens(self, network: Network) -> list[tuple[list[int], list[int]]]:
        """Of each item, the prompt's tokens and the completion's with the end of text."""
        key = network.tokenizer_key
        if key not in self._tokens:
            tokenizer = network.tokenizer
            end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
            start = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else (end or [0])[0]]
            found = []
            for row in self.rows:
                prompt, completion = row.values
                first = tokenizer(prompt)["input_ids"] if prompt else []
                first = first[:-1] if first[-1:] == end and end else first
                last = [*tokenizer(completion, add_special_tokens=False)["input_ids"], *end]
                if len(last) >= self.max_length:
                    raise RunError(
                        f"{row.where}: its completion has {len(last)} tokens, max_length is {self.max_length}",
                        "give a larger max_length",
                    )
                found.append(((first or start)[-(self.max_length - len(last)) :], last))
            self._tokens[key] = found
        return self._tokens[key]


class _Completion:
    """Prompts and completions; the loss is the mean over the completions' tokens."""

    auto_class, metric, choose_by = "AutoModelForCausalLM", "accuracy", "loss"

    def __init__(self, data: Mapping[str, _Items], files: Sequence[Path], limit: int | None) -> None:
        self._data, self.files, self._limit = dict(data), tuple(files), limit
        keep_apart({part: contents(items.rows) for part, items in data.items()})

    def drawn(self, seed: int) -> _Completion:
        """With `limit` of the train items."""
        if self._limit is None:
            return self
        other, train = copy.copy(self), self._data["train"]
        other._data = {**self._data, "train": _Items(some(list(train.rows), self._limit, seed), train.max_length)}
        return other

    @property
    def parts(self) -> Mapping[str, Sequence[str]]:
        """The ids of each part's items."""
        return {part: [row.id for row in items.rows] for part, items in self._data.items()}

    def gold(self, part: str) -> Sequence[str]:
        """The completions."""
        return [row.values[1] for row in self._data[part].rows]

    def head(self, network: Network) -> Head:
        """None: the model has its own."""
        return {}

    def lengths(self, network: Network, part: str) -> Sequence[int]:
        """Tokens of prompt and completion."""
        return [len(first) + len(last) for first, last in self._data[part].tokens(network)]

    def rows(self, network: Network, head: Head, part: str, items: Sequence[int]) -> Rows:
        """A row a token of the completions."""
        tokens = [self._data[part].tokens(network)[i] for i in items]
        ids, mask = network.padded([[*first, *last] for first, last in tokens])
        logits: Tensor = network.module(input_ids=ids, attention_mask=mask).logits
        places = [(n, len(first) + k - 1) for n, (first, last) in enumerate(tokens) for k in range(len(last))]
        row, column = (torch.tensor(one, device=ids.device) for one in zip(*places, strict=True))
        return Rows(logits[row, column], ids[row, column + 1], row)

    def measure(self, network: Network, head: Head, part: str, tick: Tick) -> Measured:
        """The share of items whose completion is what the model writes, always taking the likeliest token."""
        items = self._data[part]
        nats, count, right = 0.0, 0, {}
        answers: dict[int, str] = {}
        for group in batches(self.lengths(network, part), TOKENS):
            with torch.inference_mode():
                found = self.rows(network, head, part, group)
                losses = cross_entropy(found.logits.float(), found.targets, reduction="none")
            nats, count = nats + float(losses.double().sum()), count + len(losses)
            best = found.logits.argmax(1)
            for n, position in enumerate(group):
                mine = found.items == n
                right[position] = bool((best[mine] == found.targets[mine]).all())
                answers[position] = network.tokenizer.decode(best[mine].tolist(), skip_special_tokens=True)
            tick(len(group))
        if not math.isfinite(nats):
            raise RunError(f"model '{network.name}': its loss is not finite on {part}", "give a smaller lr")
        graded = {
            row.id: Prediction(row.values[1] if right[i] else answers[i], float(right[i]))
            for i, row in enumerate(items.rows)
        }
        return Measured(nats / count, accuracy(graded))

    def save(self, head: Head, directory: Path) -> None:
        """Nothing beside the model."""

    def head_in(self, directory: Path) -> Head:
        """Nothing beside the model."""
        return {}


@training_task
def completion(p: Params) -> TrainingTask:
    """Prompts with completions for a causal language model; the loss is the completion's alone."""
    data: dict[str, Any] = {}
    files = {part: file for part in PARTS if (file := getattr(p, part)) is not None}
    for part, file in files.items():
        rows = read_rows(file, p.id, (p.prompt, p.completion))
        for row in rows:
            for name, value in zip((p.prompt, p.completion), row.values, strict=True):
                if not isinstance(value, str) or not (value or name == p.prompt):
                    raise RunError(f"{row.where}: {name} must be text, got {value!r:.60}")
        data[part] = _Items(rows, p.max_length)
    return _Completion(data, list(files.values()), p.limit)
