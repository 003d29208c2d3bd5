"""A frozen encoder with room for a bottleneck adapter in every block.

AdaptFormer (arXiv:2205.13535), as MOS takes it (arXiv:2412.09441): beside the MLP of each block, with its input
taken before the MLP's norm and its output added to the MLP's,

    x <- x + MLP(norm(x)) + s * (U relu(D x + d) + u)

D [r, width], d [r], U [width, r], u [width]. In a block whose norm comes after the sum, as BERT's, that norm is of
this sum. An adapter is its tensors by name: `BLOCK.down.weight`, `.down.bias`, `.up.weight`, `.up.bias`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear, relu

from mergebench.errors import ModelError
from mergebench.networks.features import Inputs, Pooling, gather
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network

Adapter = Mapping[str, Tensor]

PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")
# Where a block takes what it gives its MLP, and where the MLP's output is about to be added; `` is the block.
PLACES = (
    ("norm2", ""),  # DINOv2, DINOv3
    ("layernorm_after", ""),  # ViT, DeiT, BEiT
    ("layer_norm2", ""),  # CLIP, SigLIP
    ("intermediate", "output.dense"),  # BERT and its family
    ("ffn", "ffn"),  # DistilBERT
)


class Encoder:
    """A network in which each block adds what its part of an adapter makes; without an adapter it is as it was."""

    def __init__(self, network: Network, pooling: Pooling, scale: float) -> None:
        self.network, self.pooling, self.scale = network, pooling, scale
        self._here = threading.local()  # batches run on several threads at once
        self.blocks = tuple(network.blocks)  # by name, in the order of depth
        for name, block in network.blocks.items():
            self._hook(name, block)

    def _hook(self, name: str, block: torch.nn.Module) -> None:
        inside = dict(block.named_modules())
        places = next(((r, w) for r, w in PLACES if r in inside and w in inside), None)
        if places is None:
            what = (
                f"model '{self.network.name}': no place for an adapter is known in its blocks ({type(block).__name__})"
            )
            raise ModelError(what, "encoders built like ViT, DINOv2, CLIP, BERT or DistilBERT have one")
        reads, writes = places

        def read(module: Any, args: Any) -> None:
            use = getattr(self._here, "use", None)
            self._here.delta = None if use is None else use.delta(name, args[0], self.scale)

        def write(module: Any, args: Any, out: Any) -> Any:
            delta = self._here.delta
            if delta is None:
                return out
            return (out[0] + delta, *out[1:]) if isinstance(out, tuple) else out + delta

        inside[reads].register_forward_pre_hook(read)
        inside[writes].register_forward_hook(write)

    @property
    def width(self) -> int:
        """d of the features."""
        return self.pooling.width(self.network.hidden)

    def rows(
        self, inputs: Inputs, positions: Sequence[int], adapter: Adapter | None, drop: Dropout | None = None
    ) -> Tensor:
        """[positions, width] of one batch, on the network's device; gradients reach the adapter's tensors.

        drop: with dropout between the adapter's two layers, as in training.
        """
        self._here.use = None if adapter is None else _Use(adapter, drop and drop.begin())
        try:
            return self.pooling.scaled(inputs.rows(self.network, positions, self.pooling))
        finally:
            self._here.use = None

    def features(
        self,
        inputs: Inputs,
        positions: Sequence[int],
        adapter: Adapter | None,
        tick: Tick,
        drop: Dropout | None = None,
    ) -> Tensor:
        """[positions, width], float32, on the CPU, whatever the batches and the number of cores.

        Raises `RunError` where one is not finite.
        """
        lengths = inputs.lengths(self.network)
        if adapter is not None:
            adapter = {name: tensor.to(self.network.device) for name, tensor in adapter.items()}

        def rows(group: list[int]) -> Tensor:
            noise = drop and drop.of(group[0])
            return self.rows(inputs, [positions[i] for i in group], adapter, noise)

        return gather(self.network, rows, [lengths[i] for i in positions], tick)

    def new_adapter(self, bottleneck: int, generator: Generator) -> dict[str, Tensor]:
        """An adapter that adds nothing yet: D by Kaiming's rule (uniform, a = sqrt 5), the others zero."""
        width, bound = self.network.hidden, 1 / math.sqrt(self.network.hidden)
        adapter: dict[str, Tensor] = {}
        for block in self.blocks:
            down = torch.rand(bottleneck, width, generator=generator) * 2 * bound - bound
            values = (down, torch.zeros(bottleneck), torch.zeros(width, bottleneck), torch.zeros(width))
            adapter |= {f"{block}.{part}": value for part, value in zip(PARTS, values, strict=True)}
        return adapter


class Dropout(NamedTuple):
    """Elements set to zero with probability `p`, the others divided by 1 - p; the seed says which."""

    p: float
    seed: int

    def of(self, number: int) -> Dropout:
        """Another one for each number."""
        return self._replace(seed=(self.seed * 1_000_003 + number) % 2**62)

    def begin(self) -> Callable[[Tensor], Tensor]:
        """What a forward pass calls, block after block."""
        generator = Generator().manual_seed(self.seed)

        def drop(x: Tensor) -> Tensor:
            keep = torch.rand(x.shape, generator=generator).to(x.device) >= self.p
            return x * keep / (1 - self.p)

        return drop


class _Use(NamedTuple):
    """An adapter in one forward pass."""

    adapter: Adapter
    drop: Callable[[Tensor], Tensor] | None

    def delta(self, block: str, x: Tensor, scale: float) -> Tensor:
        down, down_bias, up, up_bias = (self.adapter[f"{block}.{part}"] for part in PARTS)
        inner = relu(linear(x, down, down_bias))
        if self.drop is not None:
            inner = self.drop(inner)
        return scale * linear(inner, up, up_bias)
