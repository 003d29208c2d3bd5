"""Features of items under each adapter of a bank, computed on first use."""

from __future__ import annotations

import torch
from torch import Tensor

from mergebench.networks.features import Inputs
from mergebench.networks.loadable import Tick
from mergebench.systems.mos.bank import Bank
from mergebench.systems.mos.encoder import Encoder
from mergebench.systems.mos.variants import NONE


class Seen:
    """Features of items, computed at most once per adapter. The bank does not change, so the order of requests does not
    matter (in the published code every pass merges the stored adapters further)."""

    def __init__(self, bank: Bank, encoder: Encoder, inputs: Inputs, tick: Tick) -> None:
        self.bank, self.encoder, self.inputs, self.tick = bank, encoder, inputs, tick
        self.asked = 0  # runs of the encoder over one item, so far
        self._rows: dict[int, Tensor] = {}
        self._known: dict[int, Tensor] = {}

    def __call__(self, adapter: int, positions: Tensor) -> Tensor:
        """[positions, d] float32 under a task's adapter, or under none (-1)."""
        if adapter not in self._rows:
            self._rows[adapter] = torch.empty(len(self.inputs), self.encoder.width)
            self._known[adapter] = torch.zeros(len(self.inputs), dtype=torch.bool)
        rows, known = self._rows[adapter], self._known[adapter]
        missing = positions[~known[positions]]
        if len(missing):
            self.asked += len(missing)
            rows[missing] = self.make(adapter, missing)
            known[missing] = True
        return rows.index_select(0, positions)

    def make(self, adapter: int, positions: Tensor) -> Tensor:
        """Compute these features."""
        weights = None if adapter == NONE else self.bank.adapter(adapter)
        return self.encoder.features(self.inputs, positions.tolist(), weights, self.tick)
