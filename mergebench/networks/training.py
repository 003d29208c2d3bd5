"""Train named parameters on a model in memory: gradients of a batch in parts, and the training loop.

This file does not know the meaning of the parameters. The caller gives a dict of parameters and a function that
computes the rows of some items with them: a network with attached modules, or with layers whose weights are a function
of parameters. Optimiser and schedule are torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mergebench.engine.machine import one_thread
from mergebench.errors import RunError
from mergebench.networks.batch import CPU_TOKENS, GPU_TOKENS, batches, run_batches

Parameters = Mapping[str, Tensor]
Rows = Callable[[list[int], Parameters], Tensor]
Loss = Callable[[Tensor, Parameters], Tensor]


class Gradients(NamedTuple):
    """The gradients of one batch's loss."""

    parameters: dict[str, Tensor]  # by parameter name; without parameters that the loss does not depend on
    loss: Tensor  # [], at the parameters as they were given
    rows: Tensor  # [items, ...], in the items' order


def gradients(
    parameters: Parameters, rows: Rows, lengths: Sequence[int], device: torch.device, loss: Loss | None = None
) -> Gradients:
    """The gradients of one batch's loss, computed in parts on several cores.

    rows(part, parameters): [part, ...] of some of the batch's items, given by their numbers from 0, on `device`. It
    runs for several parts at once, on one thread each, and must compute an item's row from that item alone, up to
    rounding. loss(rows, parameters): the scalar, from the rows of all items in their order; it may use parameters that
    the rows do not, such as a head's. Without a `loss` it is the mean of all elements of the rows. Then each part is
    freed when it is done; otherwise the graphs of all parts stay in memory until the loss is known. lengths: the tokens
    of each item, at least one item.

    The parts depend on `lengths` and the sort of device alone, and their gradients are added in the order of the
    parts. So on a CPU the bits are the same whatever the number of cores. `parameters` are only read.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
    # at least two parts, by length alone, so that they do not depend on the number of cores
    tokens = min(CPU_TOKENS, math.ceil(sum(lengths) / 2)) if device.type == "cpu" else GPU_TOKENS
    parts = batches(lengths, tokens)
    order = torch.tensor([item for part in parts for item in part], device=device).argsort()

    def backward(values: Tensor, slopes: Tensor) -> Sequence[Tensor | None]:
        if not values.requires_grad:  # no parameter is in it
            return [None] * len(leaves)
        return torch.autograd.grad(values, list(leaves.values()), slopes, allow_unused=True)

    if loss is None:

        def work(part: list[int]) -> tuple[Tensor, Sequence[Tensor | None]]:
            values = rows(part, leaves)
            share = len(part) / len(lengths) / values.numel()
            return values.detach(), backward(values, torch.full_like(values, share))

        results = run_batches(work, parts, device, _nothing)
        outputs, terms = [output for output, _ in results], [slopes for _, slopes in results]
        joined = torch.cat(outputs)[order]
        value = joined.mean()
    else:
        outputs = run_batches(lambda part: rows(part, leaves), parts, device, _nothing)
        joined = torch.cat([output.detach() for output in outputs])[order].requires_grad_()
        with one_thread():  # the bits of a product may depend on the number of threads
            value = loss(joined, leaves)
            slopes, *direct = torch.autograd.grad(value, [joined, *leaves.values()], allow_unused=True)
        output_of = {part[0]: output for part, output in zip(parts, outputs, strict=True)}
        terms = run_batches(lambda part: backward(output_of[part[0]], slopes[part]), parts, device, _nothing)
        terms = [direct, *terms]
    added = {name: _sum(column) for name, *column in zip(leaves, *terms, strict=True)}
    found = {name: tensor for name, tensor in added.items() if tensor is not None}
    return Gradients(found, value.detach(), joined.detach())


def _sum(terms: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of the terms, one by one in order, without those that are None."""
    found = [term for term in terms if term is not None]
    return sum(found[1:], start=found[0]) if found else None


class Step(NamedTuple):
    """One step of training."""

    epoch: int  # from 0
    items: Tensor  # [batch] int64, the items of this step
    gradients: Gradients


def train(
    parameters: Mapping[str, Tensor],
    gradients_of: Callable[[Tensor], Gradients],
    optimiser: Optimizer,
    *,
    count: int,
    epochs: int,
    batch: int,
    generator: Generator,
    schedule: LRScheduler | None = None,
) -> Iterator[Step]:
    """Change `parameters` in place, and yield after each step of the optimiser.

    gradients_of(items): the gradients of a batch of the `count` items at the current parameters. Each epoch takes the
    items in an order drawn from `generator`, `batch` at a time, the last ones fewer. schedule: advanced after every
    epoch; a caller with a schedule by steps advances it in the loop. Raises `RunError` before the step if the loss is
    not finite.
    """
    for epoch in range(epochs):
        for items in torch.split(torch.randperm(count, generator=generator), batch):
            found = gradients_of(items)
            if not found.loss.isfinite():
                rate = optimiser.defaults["lr"]
                raise RunError("training: the loss is not finite", f"give a smaller lr than {rate:g}")
            for name, tensor in parameters.items():
                tensor.grad = found.parameters.get(name)
            optimiser.step()
            yield Step(epoch, items, found)
        if schedule is not None:
            schedule.step()


def _nothing(items: int) -> None:
    pass
