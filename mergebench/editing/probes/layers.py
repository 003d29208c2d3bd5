"""Features of texts at every layer: the states of the residual stream, pooled over a text's tokens.

Layers are numbered as in transformers' `hidden_states`: 0 is the embeddings, k the output of block k; the last layer is
read after the final norm (`post`). Before that norm (`pre`) it is the residual stream itself, as at all other layers.
The mean is over all tokens of a text, including special tokens, as in Wang et al. (arXiv:2407.08770, equation 1).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.errors import RecipeError
from mergebench.networks.features import Pooling, Texts, gather
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network

PRE = "pre"  # the residual stream before the final norm

State = int | str  # a layer's number, or `PRE`
Pool = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reading:
    """The layer, norm, pooling and length with which a probe reads a text."""

    layer: int = -1  # from the end if negative
    norm: str = "post"  # or pre; matters only at the last layer
    pool: str = "mean"  # or last, the last token alone
    max_length: int = 100  # tokens a text is cut to

    def state(self, depth: int) -> State:
        """The state that this reads of a model with `depth` blocks; `RecipeError` if it has no such layer."""
        layer = self.layer + depth + 1 if self.layer < 0 else self.layer
        if not 0 <= layer <= depth:
            what = f"layer {self.layer}: the model has {depth} blocks"
            raise RecipeError(what, f"0 (the embeddings) to {depth}, or -1 (the last) to {-depth - 1}")
        return PRE if layer == depth and self.norm == "pre" else layer


def features(network: Network, texts: Texts, reading: Reading, tick: Tick) -> Tensor:
    """[texts, width], float32, on the CPU; `texts` cut as `reading` says."""
    tokens = texts.tokens(network)
    state = reading.state(len(network.blocks))
    with stream(network, pooling(reading.pool), [state]) as read:

        def rows(group: list[int]) -> Tensor:
            return read([tokens[i] for i in group])[0]

        return gather(network, rows, [len(one) for one in tokens], tick)


def pooling(how: str) -> Pool:
    """A function of states [batch, tokens, width] and mask [batch, tokens] to rows [batch, width]."""
    return Pooling() if how == "mean" else _last


def _last(states: Tensor, mask: Tensor) -> Tensor:
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return states[torch.arange(len(states), device=states.device), (mask * places).argmax(1)]


def every_state(network: Network) -> list[State]:
    """All readable states of a model, from its embeddings on."""
    return [*range(len(network.blocks) + 1), PRE]


@contextmanager
def stream(
    network: Network, pool: Pool, states: Sequence[State]
) -> Iterator[Callable[[Sequence[Sequence[int]]], list[Tensor]]]:
    """A context with a function from token ids to these states, each pooled at once; any thread may call it.

    It uses hooks, because `output_hidden_states` keeps all states of all tokens until the end.
    """
    every = list(network.blocks.values())
    here = threading.local()

    def taken(state: State, value: Tensor) -> None:
        if hasattr(here, "mask"):  # else a thread outside this reading runs the module
            here.found[state] = pool(value, here.mask)

    def enters(module: Any, args: Any, kwargs: Any) -> None:
        taken(0, args[0] if args else kwargs["hidden_states"])

    def leaves(state: State) -> Callable[[Any, Any, Any], None]:
        return lambda module, args, out: taken(state, out[0] if isinstance(out, tuple) else out)

    handles = []
    for number, block in enumerate(every, 1):
        state = PRE if number == len(every) else number
        if state in states:
            handles.append(block.register_forward_hook(leaves(state)))
    if 0 in states:
        handles.append(every[0].register_forward_pre_hook(enters, with_kwargs=True))

    def read(tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        ids, here.mask = network.padded(tokens)
        here.found = {}
        try:
            last = network.last_states(ids, here.mask)
            taken(len(every), last)
            return [here.found[state] for state in states]
        finally:
            del here.mask, here.found

    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()
