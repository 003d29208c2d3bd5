"""Features as the published evaluation of MOS sees them, which changes the adapters it evaluates.

Its test loop takes the items in order, a batch at a time, through every stored adapter, and each such forward pass
merges that adapter once for each block (`semantics.py`); A_1 alone never changes. So what is seen of an item depends
on the batches before it, and on every evaluation before this one. Here the bank stays as it is: an adapter's drift is
the number of passes it has been through, beginning with the manifest's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergebench.cil.answers import NONE
from mergebench.cil.bank import Bank
from mergebench.cil.encoder import Encoder
from mergebench.cil.semantics import in_pass, mean_of
from mergebench.running.features import Inputs
from mergebench.running.model import Tick

GONE = 2.0**-40  # of an adapter's own part: what is left is nothing beside the mean


class Drifting:
    """One bank under one published evaluation after the other."""

    def __init__(self, bank: Bank, encoder: Encoder, inputs: Inputs, batch: int, tick: Tick) -> None:
        self.bank, self.encoder, self.inputs, self.batch, self.tick = bank, encoder, inputs, batch, tick
        self.forwards = [task.forwards for task in bank.tasks]
        kept = (1 - bank.about.alpha) ** len(encoder.blocks)
        self._last = math.ceil(math.log(GONE) / math.log(kept)) if 0 < kept < 1 else 0

    def evaluate(self, stage: int, order: Tensor) -> Evaluation:
        """The next evaluation: of the items at positions `order`, in that order, under the adapters up to `stage`."""
        before = list(self.forwards)
        for task in range(stage + 1):
            self.forwards[task] += math.ceil(len(order) / self.batch)
        place = torch.full((len(self.inputs),), -1)
        place[order] = torch.arange(len(order)) // self.batch
        return Evaluation(self, before, place)

    def _features(self, task: int, forwards: int, positions: Tensor) -> Tensor:
        """Under a task's adapter after so many passes."""
        adapter = None if task == NONE else self.bank.adapter(task)
        if adapter is not None and task > 0:
            mean = mean_of([self.bank.adapter(one) for one in range(task)]) or {}
            adapter = in_pass(adapter, mean, self.bank.about.alpha, self.encoder.blocks, forwards)
        return self.encoder.features(self.inputs, positions.tolist(), adapter, self.tick)

    def _settled(self, forwards: Tensor) -> Tensor:
        """Numbers of passes, those after which nothing changes any more made one."""
        return forwards.clamp(max=self._last)


class Evaluation:
    """One evaluation's features; asking again gives the same, as the published loop looks at each item once."""

    def __init__(self, drifting: Drifting, before: list[int], place: Tensor) -> None:
        self._drifting, self._before, self._place = drifting, before, place
        self._rows: dict[tuple[int, int], Tensor] = {}

    def __call__(self, adapter: int, positions: Tensor) -> Tensor:
        """[positions, d] float32 under a task's adapter, or under none (-1)."""
        missing = torch.tensor([one for one in positions.tolist() if (adapter, one) not in self._rows])
        if len(missing):
            fixed = adapter <= 0  # no adapter, or the first task's
            passes = torch.zeros_like(missing) if fixed else self._before[adapter] + self._place[missing]
            passes = self._drifting._settled(passes)
            for number in torch.unique(passes).tolist():
                here = missing[passes == number]
                rows = self._drifting._features(adapter, number, here)
                self._rows.update({(adapter, one): row for one, row in zip(here.tolist(), rows, strict=True)})
        return torch.stack([self._rows[adapter, one] for one in positions.tolist()])
