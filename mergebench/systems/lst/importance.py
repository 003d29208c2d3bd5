"""What an element of a weight matters: its magnitude, or its Fisher value on a task's items.

The Fisher value is the mean over items of the squared gradient of the item's loss, one item at a time, as LST takes it
(arXiv:2206.06522). A language model's loss is that of the completion. An encoder has no loss of its own: a linear head
is fitted to its features first, since a new head of zeros would pass no gradient on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergebench.checkpoint.files import Files
from mergebench.checkpoint.model import Model
from mergebench.errors import ModelError
from mergebench.networks.network import Network
from mergebench.systems.lst.choose import Importance
from mergebench.training import tasks
from mergebench.training.classification import Classification
from mergebench.training.task import Head

IMPORTANCES = ("magnitude", "fisher")
BLOCK = 1 << 22  # elements read at a time
ITEMS = 1024  # as the paper
RIDGE = 1e-3  # of the head's fit, on features of variance one
TASKS = {True: "completion", False: "text-classification"}  # of a causal model, of an encoder


def magnitude(model: Model, files: Files) -> Importance:
    """|W|, read in blocks of rows."""
    values = model.values(files)

    def blocks(name: str) -> Iterator[Tensor]:
        rows, columns = values.tensors[name].shape
        step = max(BLOCK // columns, 1)
        for first in range(0, rows, step):
            out = torch.empty(min(step, rows - first) * columns)
            values.read(name, first * columns, out)
            if not torch.isfinite(out).all():
                raise ModelError(f"{name}: it holds NaN or infinity, which has no rank")
            yield out.view(-1, columns).abs().double()

    return blocks


def of_values(found: Mapping[str, Tensor]) -> Importance:
    """Importances in memory, by the tensors' names."""

    def blocks(name: str) -> Iterator[Tensor]:
        step = max(BLOCK // found[name].shape[1], 1)
        return (block.double() for block in torch.split(found[name], step))

    return blocks


def fisher(
    model: Model, data: Path, causal: bool, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Tensor]:
    """The Fisher values of a model's float tensors on at most 1024 items of a file.

    data: JSON lines with `text` and `label` for an encoder, with `prompt` and `completion` for a language model. The
    model is in memory. Source: arXiv:2206.06522, section 2.4.
    """
    kind = tasks.get(TASKS[causal])
    task = kind(kind.params(train=data, limit=ITEMS))
    network = Network(model, task.auto_class, torch.device("cpu"), packed=False)
    head: Head = task.head(network)
    if isinstance(task, Classification):
        _fit(task, network, head)
    every = {name: getattr(*places[0]) for name, places in network.places.items() if places}
    weights = {name: one.requires_grad_() for name, one in every.items() if one.is_floating_point() and one.dim() == 2}
    found = {name: torch.zeros_like(one) for name, one in weights.items()}
    count = len(task.parts["train"])
    for item in range(count):
        rows = task.rows(network, head, "train", [item])
        loss = cross_entropy(rows.logits, rows.targets)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                found[name].addcmul_(gradient, gradient, value=1 / count)
        progress(item + 1, count)
    return found


def _fit(task: Classification, network: Network, head: Head) -> None:
    """The head of least cross-entropy on the items' features, with a little ridge."""
    with torch.no_grad():
        features = torch.cat([task.features(network, "train", [item]) for item in range(len(task.parts["train"]))])
    mean, spread = features.mean(0), features.std(0).clamp(min=1e-6)
    scaled, targets = (features - mean) / spread, task.targets("train")
    weight = torch.zeros(len(task.labels), features.shape[1], requires_grad=True)
    bias = torch.zeros(len(task.labels), requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = cross_entropy(scaled @ weight.T + bias, targets) + RIDGE * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        head["weight"].copy_(weight / spread)
        head["bias"].copy_(bias - (weight / spread) @ mean)
