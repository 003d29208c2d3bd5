"""An encoder's features of texts: one row per text, independent of batches and number of cores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mergebench.errors import RunError
from mergebench.networks.batch import CPU_TOKENS, GPU_TOKENS, batches, run_batches
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network

POOLINGS = ("mean", "cls", "cls+mean")


@dataclass(frozen=True)
class Pooling:
    """How an encoder's last hidden states become one row of features."""

    how: str = "mean"  # over the tokens (of an image: its patches); cls: the first token; or both, side by side
    normalize: bool = False  # to length one

    def width(self, hidden: int) -> int:
        return 2 * hidden if self.how == "cls+mean" else hidden

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """[batch, width], not yet scaled, from states [batch, tokens, hidden].

        mask [batch, tokens]: 1 for the tokens that the mean is over.
        """
        parts = []
        if "cls" in self.how:
            parts.append(states[:, 0])
        if "mean" in self.how:
            keep = mask.unsqueeze(-1).to(states.dtype)
            parts.append((states * keep).sum(1) / keep.sum(1).clamp(min=1))  # a text without tokens pools to zero
        return torch.cat(parts, 1)

    def scaled(self, rows: Tensor) -> Tensor:
        """Pooled rows [items, width], normalised if `normalize` is set."""
        return torch.nn.functional.normalize(rows, dim=1) if self.normalize else rows


class Inputs(Protocol):
    """Items in the form an encoder takes."""

    @property
    def key(self) -> str:
        """Equal for equal items."""

    def __len__(self) -> int: ...

    def held(self, network: Network) -> Inputs:
        """The same items, prepared to be read many times."""

    def lengths(self, network: Network) -> list[int]:
        """The number of tokens, or patches, of each item."""

    def rows(self, network: Network, positions: Sequence[int], pooling: Pooling) -> Tensor:
        """[positions, width] of one batch, pooled and not yet scaled, on the network's device."""


def features(inputs: Inputs, network: Network, pooling: Pooling, tick: Tick) -> Tensor:
    """[items, width], float32, on the CPU; computed once for all tasks on these items."""
    key = inputs.key, pooling.how
    if key in network.kept:
        tick(len(inputs))
    else:
        network.kept[key] = gather(
            network, lambda group: inputs.rows(network, group, pooling), inputs.lengths(network), tick
        )
    return pooling.scaled(network.kept[key])


class Texts:
    """Texts, tokenized once for all models with equal tokenizers, cut to `max_length` tokens."""

    def __init__(self, texts: Sequence[str], max_length: int) -> None:
        self.texts, self.max_length = list(texts), max_length
        self.key = hashlib.sha256(json.dumps([self.texts, max_length]).encode()).hexdigest()
        self._tokens: dict[str, list[list[int]]] = {}

    def __len__(self) -> int:
        return len(self.texts)

    def held(self, network: Network) -> Texts:
        return self  # its tokens are cached already

    def lengths(self, network: Network) -> list[int]:
        return [len(one) for one in self.tokens(network)]

    def rows(self, network: Network, positions: Sequence[int], pooling: Pooling) -> Tensor:
        tokens = self.tokens(network)
        return pooling(*network.encode([tokens[i] for i in positions]))

    def tokens(self, network: Network) -> list[list[int]]:
        """The token ids of every text."""
        key = network.tokenizer_key
        if key not in self._tokens:
            self._tokens[key] = network.tokenize(self.texts, self.max_length)
        return self._tokens[key]


def gather(network: Network, rows: Callable[[list[int]], Tensor], lengths: Sequence[int], tick: Tick) -> Tensor:
    """The rows of all items, in order; `lengths` has each item's number of tokens. `RunError` if a row is not
    finite."""
    found: dict[int, Tensor] = {}
    scatter(network, rows, lengths, lambda group, part: found.update(zip(group, part, strict=True)), tick)
    return torch.stack([found[position] for position in range(len(lengths))])


def scatter(
    network: Network,
    rows: Callable[[list[int]], Tensor],
    lengths: Sequence[int],
    keep: Callable[[list[int], Tensor], None],
    tick: Tick,
) -> None:
    """As `gather`, for rows that do not fit into memory: each batch's rows, on the CPU, are passed to `keep`.

    Several threads may call `keep` at once, each with other items.
    """

    def work(group: list[int]) -> None:
        with torch.inference_mode():
            part = rows(group).cpu()
        if not part.isfinite().all():
            raise RunError(f"model '{network.name}': its outputs are not finite", "look for NaN or Inf in its weights")
        keep(group, part)

    groups = batches(lengths, CPU_TOKENS if network.device.type == "cpu" else GPU_TOKENS)
    run_batches(work, groups, network.device, tick)
