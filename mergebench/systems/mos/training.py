"""Train one task's adapter on a frozen encoder, merging it toward the earlier adapters after every step.

MOS (arXiv:2412.09441): cross-entropy over the task's own classes, other logits left out, plus `orthogonality` times

    CE(M M^T / 0.8, identity),  M = [means of all classes before; features of the batch]

which keeps features of different items apart. SGD with momentum 0.9, its rate following a cosine over the epochs;
the head's is a tenth of the adapter's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, linear
from torch.optim.lr_scheduler import CosineAnnealingLR

from mergebench.networks import training
from mergebench.networks.bottleneck import Dropout
from mergebench.networks.features import Inputs
from mergebench.networks.loadable import Tick
from mergebench.networks.training import Gradients, Parameters, gradients
from mergebench.systems.mos.encoder import Encoder
from mergebench.systems.mos.merging import Merging

MOMENTUM, HEAD_RATE, TEMPERATURE = 0.9, 0.1, 0.8


@dataclass(frozen=True)
class Settings:
    """How a task is trained; the defaults are the paper's for CIFAR-100."""

    epochs: int = 20
    batch: int = 48
    lr: float = 0.03
    weight_decay: float = 5e-4
    orthogonality: float = 0.1
    dropout: float = 0.1


class Items(NamedTuple):
    """A task's training items."""

    inputs: Inputs
    positions: Sequence[int]  # in `inputs`
    labels: Tensor  # [n] int64, from 0 within the task

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1


class Trained(NamedTuple):
    """What training leaves, on the CPU."""

    adapter: dict[str, Tensor]
    weight: Tensor  # [c, d], the head's rows of this task's classes
    bias: Tensor  # [c]
    loss: float  # of the last epoch
    accuracy: float  # of the last epoch's training items, as they were met


def train(
    encoder: Encoder,
    items: Items,
    start: Mapping[str, Tensor],
    means: Tensor | None,
    merging: Merging,
    settings: Settings,
    generator: Generator,
    tick: Tick,
) -> Trained:
    """Train an adapter that begins as `start`, and a head of its own, on a task.

    means [classes before, d]: of features under their own adapters; None for the first task. Raises `RunError` where
    the loss is not finite.
    """
    device = encoder.network.device
    adapter = {name: tensor.clone().to(device).requires_grad_() for name, tensor in start.items()}
    classes, bound = items.classes, encoder.width**-0.5
    weight, bias = (
        (torch.rand(shape, generator=generator) * 2 * bound - bound).to(device).requires_grad_()
        for shape in ((classes, encoder.width), (classes,))
    )
    head = {"weight": weight, "bias": bias}
    means = None if means is None else means.to(device)
    groups: list[dict[str, Any]] = [
        {"params": list(adapter.values())},
        {"params": list(head.values()), "lr": HEAD_RATE * settings.lr},
    ]
    optimiser = torch.optim.SGD(groups, settings.lr, MOMENTUM, weight_decay=settings.weight_decay)
    lengths = items.inputs.lengths(encoder.network)
    lengths = [lengths[position] for position in items.positions]

    def gradients_of(chosen: Tensor) -> Gradients:
        """Those at the tensors that the pass computes with; the rows are its logits."""
        labels, batch = items.labels[chosen].to(device), chosen.tolist()
        used = merging.forward(adapter)
        drop = _dropout(settings.dropout, generator)

        def rows(part: list[int], parameters: Parameters) -> Tensor:
            positions = [items.positions[batch[i]] for i in part]
            return encoder.rows(items.inputs, positions, parameters, drop and drop.of(part[0]))

        def loss(features: Tensor, parameters: Parameters) -> Tensor:
            logits = linear(features, parameters["weight"], parameters["bias"])
            return cross_entropy(logits, labels) + settings.orthogonality * _overlap(means, features)

        found = gradients({**used, **head}, rows, [lengths[i] for i in batch], device, loss)
        with torch.no_grad():
            return found._replace(rows=linear(found.rows, weight, bias))

    losses, right = [0.0] * max(settings.epochs, 1), [0] * max(settings.epochs, 1)
    for step in training.train(
        adapter | head,
        gradients_of,
        optimiser,
        count=len(items.positions),
        epochs=settings.epochs,
        batch=settings.batch,
        generator=generator,
        schedule=CosineAnnealingLR(optimiser, max(settings.epochs, 1)),
    ):
        merging.step(adapter)
        size, labels = len(step.items), items.labels[step.items].to(device)
        losses[step.epoch] += step.gradients.loss.item() * size
        right[step.epoch] += int((step.gradients.rows.argmax(1) == labels).sum())
        tick(size)
    trained = {name: tensor.detach().cpu() for name, tensor in adapter.items()}
    count = len(items.positions)
    return Trained(trained, weight.detach().cpu(), bias.detach().cpu(), losses[-1] / count, right[-1] / count)


def _dropout(share: float, generator: Generator) -> Dropout | None:
    return Dropout(share, int(torch.randint(2**62, (), generator=generator))) if share else None


def _overlap(means: Tensor | None, features: Tensor) -> Tensor:
    """How hard rows are to tell from one another by their products (the published code's loss, not normalised)."""
    rows = features if means is None else torch.cat([means, features])
    return cross_entropy(rows @ rows.T / TEMPERATURE, torch.arange(len(rows), device=rows.device))
