"""Learn a sequence of tasks by MOS (arXiv:2412.09441), and produce each task's part of the bank.

For each task: train its adapter from the last one, merged toward the mean of those before; statistics of its classes
under that adapter; prototypes under the first one; then align the head of all classes so far with features drawn by the
statistics. The published code continues merging while it gathers the statistics, and the next task starts from the
result (`merging.py`); its prototypes are means of features with dropout, from the second task on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from mergebench.networks.bottleneck import Adapter, Dropout
from mergebench.networks.features import Inputs
from mergebench.networks.loadable import Tick
from mergebench.systems.mos.alignment import align
from mergebench.systems.mos.bank import Bank
from mergebench.systems.mos.config import Config
from mergebench.systems.mos.encoder import Encoder
from mergebench.systems.mos.merging import Merging, mean_of, merging_of
from mergebench.systems.mos.statistics import ClassStatistics, of_classes
from mergebench.systems.mos.training import Items, Settings, Trained, train

PASSES = 3  # training batches in one of those that gather statistics


class Left(NamedTuple):
    """The result of a task: the arguments of `BankWriter.add`, and training statistics."""

    files: dict[str, Any]
    trained: Trained


class Learner:
    """Learns the tasks of one bank, each from the bank's current content.

    epochs: 0 for adapters that add nothing, under a head that alignment alone makes.
    """

    def __init__(
        self, encoder: Encoder, inputs: Inputs, labels: Sequence[str], config: Config, alpha: float, epochs: int
    ) -> None:
        self.encoder, self.inputs, self.labels = encoder, inputs, labels
        self.config, self.alpha, self.epochs = config, alpha, epochs
        self.settings = Settings(
            epochs, config.batch, config.lr, config.weight_decay, config.orthogonality, config.dropout
        )

    def work(self, classes: Sequence[str]) -> int:
        """The number of items that `tick` counts while a task is learnt."""
        return (self.epochs + 3) * sum(label in classes for label in self.labels)

    def learn(self, classes: Sequence[str], bank: Bank | None, seed: int, tick: Tick) -> Left:
        """The next task; bank: those before, None for the first."""
        task = 0 if bank is None else len(bank.tasks)
        generator = Generator().manual_seed(seed * 1_000_003 + task)
        items = self._items(classes)
        earlier = [] if bank is None else [bank.adapter(one) for one in range(task)]
        merging = merging_of(self.config.semantics, mean_of(earlier), self.alpha, self.encoder.blocks)
        known = [] if bank is None else [ClassStatistics.of_tensors(bank.statistics(one)) for one in range(task)]
        means = torch.cat([one.mean for one in known]) if known else None
        start = self._start(bank, earlier, generator)
        trained = train(self.encoder, items, start, means, merging, self.settings, generator, tick)
        statistics = self._statistics(trained.adapter, items, merging, classes, generator, tick)
        first = earlier[0] if earlier else trained.adapter
        noisy = self.config.semantics == "reference" and task > 0 and self.config.dropout > 0
        drop = Dropout(self.config.dropout, seed) if noisy else None
        own = trained.weight, trained.bias
        files = {
            "adapter": trained.adapter,
            "trained": own,
            "head": own if task == 0 and self.epochs else self._align(bank, own, [*known, statistics], generator),
            "statistics": statistics.tensors(),
            "prototype": self._means(items, first, tick, drop),
            "frozen": self._means(items, None, tick),
        }
        return Left(files, trained)

    def _items(self, classes: Sequence[str]) -> Items:
        number = {name: i for i, name in enumerate(classes)}
        positions = [i for i, label in enumerate(self.labels) if label in number]
        return Items(self.inputs, positions, torch.tensor([number[self.labels[i]] for i in positions]))

    def _start(self, bank: Bank | None, earlier: Sequence[Adapter], generator: Generator) -> Adapter:
        """The last task's adapter, as gathering its statistics left it; a new one for the first task."""
        if bank is None:
            return self.encoder.new_adapter(self.config.bottleneck, generator)
        last = {name: tensor.clone() for name, tensor in earlier[-1].items()}
        merging = merging_of(self.config.semantics, mean_of(earlier[:-1]), self.alpha, self.encoder.blocks)
        items = self._items(bank.tasks[-1].classes)
        for _ in self._passes(items):
            merging.forward(last)
        return last

    def _statistics(
        self, adapter: Adapter, items: Items, merging: Merging, classes: Sequence[str], generator: Generator, tick: Tick
    ) -> ClassStatistics:
        going = {name: tensor.clone() for name, tensor in adapter.items()}
        features = torch.empty(len(items.positions), self.encoder.width)
        for group in self._passes(items):
            here = [items.positions[i] for i in group]
            features[group] = self.encoder.features(self.inputs, here, merging.forward(going), tick)
        return of_classes(features, items.labels, classes, self.config.statistics, generator)

    def _passes(self, items: Items) -> Iterator[list[int]]:
        """A task's items as statistics are gathered: class by class, some batches at once."""
        for label in range(items.classes):
            own = (items.labels == label).nonzero().flatten()
            yield from map(Tensor.tolist, torch.split(own, PASSES * self.config.batch))

    def _means(self, items: Items, adapter: Adapter | None, tick: Tick, drop: Dropout | None = None) -> Tensor:
        """[c, d]: the mean features of each class."""
        features = self.encoder.features(self.inputs, items.positions, adapter, tick, drop)
        return torch.stack([features[items.labels == one].mean(0) for one in range(items.classes)])

    def _align(
        self,
        bank: Bank | None,
        own: tuple[Tensor, Tensor],
        statistics: Sequence[ClassStatistics],
        generator: Generator,
    ) -> tuple[Tensor, Tensor]:
        """The head of all classes so far, from the last one and the rows of the new."""
        if bank is not None:
            last = bank.head(len(bank.tasks) - 1)
            own = torch.cat([last.weight, own[0]]), torch.cat([last.bias, own[1]])
        return align(
            *own,
            statistics,
            epochs=self.config.align_epochs,
            lr=self.config.align_lr,
            batch=self.config.batch,
            weight_decay=self.config.weight_decay,
            generator=generator,
        )
