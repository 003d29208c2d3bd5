"""Retraining a head on features drawn from the Gaussians of all its classes (arXiv:2303.05118; arXiv:2412.09441).

Each task trains only the rows of its own classes. Features drawn for every class, including old classes, make the rows
comparable; only the head learns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, linear

from mergebench.engine.machine import one_thread
from mergebench.errors import RunError
from mergebench.systems.mos.statistics import ClassStatistics

DRAWS = 5  # a class and epoch, in units of the batch


def draw(statistics: Sequence[ClassStatistics], per_class: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Features [C * per_class, d] of the classes of all tasks, and the class [C * per_class] of each."""
    rows = torch.cat([task.draw(per_class, generator) for task in statistics])
    return rows.flatten(0, 1), torch.arange(len(rows)).repeat_interleave(per_class)


def align(
    weight: Tensor,
    bias: Tensor,
    statistics: Sequence[ClassStatistics],
    *,
    generator: Generator,
    epochs: int = 30,
    lr: float = 0.005,
    batch: int = 48,
    weight_decay: float = 5e-4,
) -> tuple[Tensor, Tensor]:
    """A head's weight [C, d] and bias [C] after alignment; the inputs are not changed.

    SGD with momentum 0.9, its rate falling to zero by a cosine over the epochs. Each epoch draws 5 * batch features a
    class and goes through all, shuffled, in C steps. Raises `RunError` if the head does not stay finite.
    """
    weight, bias = (tensor.detach().float().clone().requires_grad_() for tensor in (weight, bias))
    optimiser = torch.optim.SGD([weight, bias], lr=lr, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    with one_thread():
        for _ in range(epochs):
            rows, classes = draw(statistics, DRAWS * batch, generator)
            for part in torch.randperm(len(rows), generator=generator).chunk(len(weight)):
                with torch.enable_grad():
                    loss = cross_entropy(linear(rows[part], weight, bias), classes[part])
                weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
                optimiser.step()
            schedule.step()
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise RunError("classifier alignment: the head is no longer finite", f"a smaller rate than {lr:g} may hold")
    return weight.detach(), bias.detach()
