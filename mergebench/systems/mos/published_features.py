"""Features as in the published evaluation of MOS, which changes the adapters it evaluates.

Its test loop takes the items in order, a batch at a time, through every stored adapter, and each such forward pass
merges that adapter once for each block (`merging.py`); only A_1 never changes. So the features of an item depend on the
earlier batches and on all earlier evaluations. Here the bank does not change: an adapter's drift follows from the
number of its passes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergebench.networks.features import Inputs
from mergebench.networks.loadable import Tick
from mergebench.systems.mos.bank import Bank
from mergebench.systems.mos.encoder import Encoder
from mergebench.systems.mos.feature_cache import Seen
from mergebench.systems.mos.merging import in_pass, mean_of

GONE = 2.0**-40  # of an adapter's own part: what is left is nothing beside the mean


class Drifting:
    """One bank under one published evaluation after the other."""

    def __init__(self, bank: Bank, encoder: Encoder, inputs: Inputs, batch: int, tick: Tick) -> None:
        self.bank, self.encoder, self.inputs, self.batch, self.tick = bank, encoder, inputs, batch, tick
        self.forwards = [0] * len(bank.tasks)  # of each adapter, since it was stored
        kept = (1 - bank.about.alpha) ** len(encoder.blocks)
        settled = math.ceil(math.log(GONE) / math.log(kept)) if 0 < kept < 1 else 0
        self.settled = After(bank, encoder, inputs, tick, settled)  # from there on passes change nothing

    def evaluate(self, stage: int, order: Tensor) -> Evaluation:
        """The next evaluation: of the items at positions `order`, in that order, under the adapters up to `stage`."""
        found = Evaluation(self, order)
        for task in range(stage + 1):
            self.forwards[task] += math.ceil(len(order) / self.batch)
        return found


class After(Seen):
    """Features in the forward pass that follows so many others."""

    def __init__(self, bank: Bank, encoder: Encoder, inputs: Inputs, tick: Tick, passes: int) -> None:
        super().__init__(bank, encoder, inputs, tick)
        self.passes = passes

    def make(self, adapter: int, positions: Tensor) -> Tensor:
        if adapter <= 0:  # none, or the first task's
            return super().make(adapter, positions)
        stored, before = self.bank.adapter(adapter), [self.bank.adapter(one) for one in range(adapter)]
        used = in_pass(stored, mean_of(before) or {}, self.bank.about.alpha, self.encoder.blocks, self.passes)
        return self.encoder.features(self.inputs, positions.tolist(), used, self.tick)


class Evaluation(Seen):
    """The features of one evaluation; asking again gives the same, for its loop takes each item once."""

    def __init__(self, drifting: Drifting, order: Tensor) -> None:
        super().__init__(drifting.bank, drifting.encoder, drifting.inputs, drifting.tick)
        self._settled, self._before = drifting.settled, list(drifting.forwards)
        self._batch = torch.zeros(len(drifting.inputs), dtype=torch.int64)
        self._batch[order] = torch.arange(len(order)) // drifting.batch

    def make(self, adapter: int, positions: Tensor) -> Tensor:
        if adapter <= 0:  # what no pass changes is made once for all evaluations
            return self._settled(adapter, positions)
        passes = (self._before[adapter] + self._batch[positions]).clamp(max=self._settled.passes)
        rows = torch.empty(len(positions), self.encoder.width)
        for number in torch.unique(passes).tolist():
            here = passes == number
            if number == self._settled.passes:
                rows[here] = self._settled(adapter, positions[here])
            else:
                after = After(self.bank, self.encoder, self.inputs, self.tick, number)
                rows[here] = after.make(adapter, positions[here])
        return rows
