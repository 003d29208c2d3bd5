"""What evaluating a bank does to its answers, in the published code's semantics and in the paper's (MOS).

    python benchmarks/mos_semantics.py BANK DATA [--batches 64 16 1] [--passes 4] [--backbone MODEL]

BANK is a bank of `mergebench cil run`, DATA its test items. In the published code every forward pass of an evaluation
merges the stored adapters further; that is emulated (mergebench/systems/mos/published_features.py, held against the
code itself by tests/systems/mos/test_published.py), the bank is only read. For every batch size: identical evaluations
of all items, one after the other, from the bank as it is; then from a bank that was evaluated after every task before,
as a training run of the published code does it. In the paper's semantics: all items at once, then batch by batch,
everything made anew.

Prints Markdown: accuracy, the share of answers that differ from the first evaluation (published: with this batch size),
and from the paper's.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
from speed import commit
from torch import Tensor

from mergebench.networks.attach import Encoder
from mergebench.networks.features import Inputs
from mergebench.systems.mos.bank import Bank, read_bank
from mergebench.systems.mos.feature_cache import Seen
from mergebench.systems.mos.inference import open_encoder, read_items
from mergebench.systems.mos.merging import mean_of
from mergebench.systems.mos.published_features import Drifting
from mergebench.systems.mos.variants import Features, mos


class Experiment:
    """One bank and its test items, class by class as the published code takes them."""

    def __init__(self, bank: Bank, encoder: Encoder, inputs: Inputs, labels: list[str]) -> None:
        self.bank, self.encoder, self.inputs = bank, encoder, inputs
        truth = torch.tensor([bank.classes.index(label) for label in labels])
        self.order = truth.argsort(stable=True)
        self.truth, self.last = truth[self.order], len(bank.tasks) - 1
        self.pure = self.paper(len(labels))

    def paper(self, batch: int) -> Tensor:
        """Answers [n], a batch at a time."""
        parts = self.order.split(batch)
        seen = Seen(self.bank, self.encoder, self.inputs, _nothing)
        return torch.cat([self._answers(seen, part) for part in parts])

    def published(self, batch: int, passes: int) -> list[Tensor]:
        """The answers [n] of every evaluation."""
        drifting = Drifting(self.bank, self.encoder, self.inputs, batch, _nothing)
        return [self._answers(drifting.evaluate(self.last, self.order), self.order) for _ in range(passes)]

    def after_every_task(self, batch: int) -> Tensor:
        """The answers [n] of the evaluation that ends a training run."""
        drifting, tasks = Drifting(self.bank, self.encoder, self.inputs, batch, _nothing), self.bank.task_of[self.truth]
        for stage in range(self.last):
            drifting.evaluate(stage, self.order[tasks <= stage])
        return self._answers(drifting.evaluate(self.last, self.order), self.order)

    def _answers(self, features: Features, positions: Tensor) -> Tensor:
        return mos(self.bank, self.last, features, positions).classes

    def row(self, what: str, batch: int, answers: Tensor, first: Tensor) -> str:
        """A line of the table."""
        right, changed, other = (
            (answers == self.truth).double().mean(),
            *((answers != one).double().mean() for one in (first, self.pure)),
        )
        return f"| {what} | {batch} | {right:.2%} | {changed:.2%} | {other:.2%} |"


def own_parts(bank: Bank) -> str:
    """Of every adapter but the first: how far U, which began as zero, is from the mean of those before, by its norm."""
    shares = []
    for task in range(1, len(bank.tasks)):
        adapter, mean = bank.adapter(task), mean_of([bank.adapter(one) for one in range(task)]) or {}
        ups = {name: tensor for name, tensor in adapter.items() if name.endswith(".up.weight")}
        away = sum((tensor - mean[name]).square().sum() for name, tensor in ups.items())
        shares.append(f"{bank.tasks[task].name} {(away / sum(t.square().sum() for t in ups.values())).sqrt():.1%}")
    return ", ".join(shares)


def _nothing(items: int) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 16, 1])
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--backbone")
    args = parser.parse_args()
    bank = read_bank(args.bank)
    data = read_items(bank, args.data, labelled=True)
    encoder = open_encoder(bank, torch.device("cpu"), args.backbone)
    experiment = Experiment(bank, encoder, data.inputs.held(encoder.network), data.labels)
    print(f"Commit {commit()}, torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}.")
    print(f"A bank of {len(bank.tasks)} tasks trained in {bank.about.semantics} semantics, {len(data.rows)} items.")
    print(f"Distance of an adapter's U from the mean of those before, by its own norm: {own_parts(bank)}.\n")
    print(
        "| evaluation | batch | accuracy | differs from the first | differs from paper |\n|---|---|---|---|---|",
        flush=True,
    )
    print(experiment.row("paper, 1.", len(data.rows), experiment.pure, experiment.pure), flush=True)
    for number, batch in enumerate(args.batches, 2):
        print(experiment.row(f"paper, {number}.", batch, experiment.paper(batch), experiment.pure), flush=True)
    for batch in args.batches:
        found = experiment.published(batch, args.passes)
        for number, answers in enumerate(found, 1):
            print(experiment.row(f"published, {number}.", batch, answers, found[0]), flush=True)
        print(
            experiment.row("published, after every task", batch, experiment.after_every_task(batch), found[0]),
            flush=True,
        )


if __name__ == "__main__":
    main()
