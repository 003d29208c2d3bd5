"""Training one task's adapter on a frozen encoder, merged all the while toward those before it.

MOS (arXiv:2412.09441): cross-entropy over the task's own classes, other logits left out, plus `orthogonality` times

    CE(M M^T / 0.8, identity),  M = [means of all classes before; features of the batch]

which keeps features of different items apart. SGD with momentum 0.9, its rate following a cosine over the epochs;
the head's is a tenth of the adapter's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, linear

from mergebench.errors import RunError
from mergebench.networks.attach import Dropout, Encoder
from mergebench.networks.batch import CPU_TOKENS, GPU_TOKENS, batches, run_batches
from mergebench.networks.features import Inputs
from mergebench.networks.loadable import Tick
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
    means = None if means is None else means.to(device)
    groups: list[dict[str, Any]] = [
        {"params": list(adapter.values())},
        {"params": [weight, bias], "lr": HEAD_RATE * settings.lr},
    ]
    optimiser = torch.optim.SGD(groups, settings.lr, MOMENTUM, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(settings.epochs, 1))
    step = _Step(encoder, items, settings.dropout)
    loss, right = 0.0, 0
    for _ in range(settings.epochs):
        loss, right = 0.0, 0
        for chosen in _shuffled(len(items.positions), settings.batch, generator):
            labels = items.labels[chosen].to(device)

            def judge(features: Tensor, labels: Tensor = labels) -> tuple[Tensor, Tensor]:
                logits = linear(features, weight, bias)
                return cross_entropy(logits, labels) + settings.orthogonality * _overlap(means, features), logits

            optimiser.zero_grad()
            used = merging.forward(adapter)
            value, logits = step.backward(chosen.tolist(), used, adapter, judge, generator)
            if not value.isfinite():
                raise RunError("training: the loss is not finite", f"give a smaller lr than {settings.lr:g}")
            optimiser.step()
            merging.step(adapter)
            loss += value.item() * len(chosen)
            right += int((logits.argmax(1) == labels).sum())
            tick(len(chosen))
        schedule.step()
    done = {name: tensor.detach().cpu() for name, tensor in adapter.items()}
    count = len(items.positions)
    return Trained(done, weight.detach().cpu(), bias.detach().cpu(), loss / count, right / count)


class _Step:
    """Gradients of one batch, its parts on several cores: only the loss needs the features of all."""

    def __init__(self, encoder: Encoder, items: Items, dropout: float) -> None:
        self.encoder, self.items, self.dropout = encoder, items, dropout
        self.lengths = items.inputs.lengths(encoder.network)

    def backward(
        self,
        chosen: Sequence[int],
        used: Mapping[str, Tensor],
        adapter: Mapping[str, Tensor],
        judge: Callable[[Tensor], tuple[Tensor, Tensor]],
        generator: Generator,
    ) -> tuple[Tensor, Tensor]:
        """The loss and the logits [chosen, classes]; the gradient at `used` is left at `adapter`."""
        positions = [self.items.positions[i] for i in chosen]
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in used.items()}
        drop = Dropout(self.dropout, int(torch.randint(2**62, (), generator=generator))) if self.dropout else None
        device = self.encoder.network.device
        lengths = [self.lengths[i] for i in positions]
        # two parts or more, by length alone: the same whatever the number of cores
        most = min(CPU_TOKENS, math.ceil(sum(lengths) / 2)) if device.type == "cpu" else GPU_TOKENS
        parts = batches(lengths, most)

        def forward(part: list[int]) -> Tensor:
            here = [positions[i] for i in part]
            return self.encoder.rows(self.items.inputs, here, leaves, drop and drop.of(part[0]))

        rows = run_batches(forward, parts, device, _nothing)
        order = torch.tensor([i for part in parts for i in part], device=device).argsort()
        features = torch.cat([one.detach() for one in rows])[order].requires_grad_()
        loss, logits = judge(features)
        torch.autograd.backward(loss)
        assert features.grad is not None
        made, slopes = {part[0]: one for part, one in zip(parts, rows, strict=True)}, features.grad

        def backward(part: list[int]) -> Sequence[Tensor]:
            return torch.autograd.grad(made[part[0]], list(leaves.values()), slopes[part])

        found = run_batches(backward, parts, device, _nothing)
        for tensor, *gradients in zip(adapter.values(), *found, strict=True):
            tensor.grad = sum(gradients[1:], start=gradients[0])  # one by one, in the order of the parts
        return loss.detach(), logits.detach()


def _overlap(means: Tensor | None, features: Tensor) -> Tensor:
    """How hard rows are to tell from one another by their products (the published code's loss, not normalised)."""
    rows = features if means is None else torch.cat([means, features])
    return cross_entropy(rows @ rows.T / TEMPERATURE, torch.arange(len(rows), device=rows.device))


def _shuffled(count: int, batch: int, generator: Generator) -> Iterator[Tensor]:
    yield from torch.split(torch.randperm(count, generator=generator), batch)


def _nothing(items: int) -> None:
    pass
