"""A bottleneck beside each block's MLP.

AdaptFormer (arXiv:2205.13535) as used by MOS (arXiv:2412.09441): with x the MLP's input before the MLP's norm,

    x <- x + MLP(norm(x)) + s * (U relu(D x + d) + u)

D [r, width], d [r], U [width, r], u [width]. An adapter is its tensors by name: `BLOCK.down.weight`, `.down.bias`,
`.up.weight`, `.up.bias`. `attach.py` adds the last term to the blocks of a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear, relu

Adapter = Mapping[str, Tensor]

PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


class Dropout(NamedTuple):
    """Sets elements to zero with probability `p` and divides the others by 1 - p; the seed determines which."""

    p: float
    seed: int

    def of(self, number: int) -> Dropout:
        """A different dropout for each number."""
        return self._replace(seed=(self.seed * 1_000_003 + number) % 2**62)

    def begin(self) -> Callable[[Tensor], Tensor]:
        """A function that a forward pass calls in each block."""
        generator = Generator().manual_seed(self.seed)

        def drop(x: Tensor) -> Tensor:
            keep = torch.rand(x.shape, generator=generator).to(x.device) >= self.p
            return x * keep / (1 - self.p)

        return drop


def bottleneck(adapter: Adapter, scale: float, drop: Dropout | None = None) -> Callable[[str, Tensor], Tensor]:
    """The function of one forward pass with an adapter: from a block's name and x [..., width] to a tensor of x's
    shape.

    drop: dropout of the inner layer's elements, after the ReLU.
    """
    thin = None if drop is None else drop.begin()

    def beside(block: str, x: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (adapter[f"{block}.{part}"] for part in PARTS)
        inner = relu(linear(x, down, down_bias))
        if thin is not None:
            inner = thin(inner)
        return scale * linear(inner, up, up_bias)

    return beside


def new_adapter(blocks: Sequence[str], width: int, rank: int, generator: Generator) -> dict[str, Tensor]:
    """An adapter that adds nothing yet: D by Kaiming's rule (uniform, a = sqrt 5), the others zero."""
    bound = 1 / math.sqrt(width)
    adapter: dict[str, Tensor] = {}
    for block in blocks:
        down = torch.rand(rank, width, generator=generator) * 2 * bound - bound
        values = (down, torch.zeros(rank), torch.zeros(width, rank), torch.zeros(width))
        adapter |= {f"{block}.{part}": value for part, value in zip(PARTS, values, strict=True)}
    return adapter
