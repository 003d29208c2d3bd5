"""A frozen encoder whose blocks have room for a bottleneck, and its features of items under one adapter or none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator, Tensor

from mergebench.networks.attach import Hooks
from mergebench.networks.bottleneck import Adapter, Dropout, bottleneck, new_adapter
from mergebench.networks.features import Inputs, Pooling, gather
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network


class Encoder:
    """A network in which each block adds what its part of an adapter makes; without an adapter it is as it was."""

    def __init__(self, network: Network, pooling: Pooling, scale: float) -> None:
        self.network, self.pooling, self.scale = network, pooling, scale
        self._hooks = Hooks(network)
        self.blocks = self._hooks.blocks  # by name, in the order of depth

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
        with self._hooks.attached(None if adapter is None else bottleneck(adapter, self.scale, drop)):
            return self.pooling.scaled(inputs.rows(self.network, positions, self.pooling))

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

    def new_adapter(self, rank: int, generator: Generator) -> dict[str, Tensor]:
        """An adapter for these blocks that adds nothing yet."""
        return new_adapter(self.blocks, self.network.hidden, rank, generator)
