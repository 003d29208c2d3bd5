"""Self-refined retrieval of adapters (MOS, arXiv:2412.09441): find the adapter for each item.

A first guess names a task; the head, on the features under that task's adapter, names a task again; and so on, until
the head names the task whose adapter made the features, or after `LIMIT` evaluations. The last evaluated adapter is the
result.

Only the adapters on an item's own path are evaluated, and all items at one adapter in a step are evaluated together.
The published code computes features under every adapter, and then goes item by item.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LIMIT = 4  # evaluations, as the authors have it

Ask = Callable[[int, Tensor], Tensor]  # an adapter, items [m] -> the task predicted for each under that adapter [m]


@dataclass(frozen=True)
class Retrieval:
    """The paths of n items; whole numbers are int64."""

    visited: Tensor  # [n, limit]: the adapter of each evaluation; -1 after the last
    predicted: Tensor  # [n, limit]: the task that each evaluation predicted; -1 after the last

    @property
    def evaluations(self) -> Tensor:
        """[n], 1 to `limit`; an adapter that comes again counts again, though its answer is known."""
        return (self.visited >= 0).sum(1)

    @property
    def adapter(self) -> Tensor:
        """[n]: the last one evaluated."""
        return self._last(self.visited)

    @property
    def agreement(self) -> Tensor:
        """[n] bool: whether the last evaluation predicted the task whose adapter it used."""
        return self._last(self.predicted) == self.adapter

    @property
    def cycle(self) -> Tensor:
        """[n] bool: whether the path returned to an earlier adapter, and so is in a cycle."""
        back = (self.visited == self._last(self.predicted)[:, None]).any(1)
        return back & ~self.agreement

    def held(self, step: int) -> Tensor:
        """[n]: the adapter at step 0 (the first guess), 1, ...; where the path has ended, its last."""
        now = self.visited[:, step]
        return torch.where(now >= 0, now, self.adapter)

    def summary(self, tasks: Tensor | None) -> dict[str, Any]:
        """Evaluations an item, and shares of items: with cycles, in agreement, and where their own tasks [n] are known
        under `steps` those that hold its adapter at step 0, 1, ...
        """
        steps = range(self.visited.shape[1])
        return {
            "steps": None if tasks is None else [share(self.held(step) == tasks) for step in steps],
            "evaluations": share(self.evaluations),
            "cycles": share(self.cycle),
            "agreement": share(self.agreement),
        }

    def _last(self, of: Tensor) -> Tensor:
        return of.gather(1, self.evaluations[:, None] - 1)[:, 0]


def share(of: Tensor) -> float:
    """The mean over items."""
    return float(of.double().mean())


def retrieve(first: Tensor, ask: Ask, limit: int = LIMIT) -> Retrieval:
    """The paths of items whose first guesses are the tasks `first` [n].

    `ask(adapter, items)` is called once a step for all items that stand at an adapter, and never twice for the same
    item and adapter; items are positions in `first`, ascending.
    """
    visited = torch.full((len(first), limit), -1)
    predicted = visited.clone()
    items, current = torch.arange(len(first)), first
    for step in range(limit):
        answers = torch.full_like(current, -1)
        for before in range(step):  # it was here before: the answer is known
            answers = torch.where(visited[items, before] == current, predicted[items, before], answers)
        for adapter in torch.unique(current[answers < 0]).tolist():
            asked = (current == adapter) & (answers < 0)
            answers[asked] = ask(adapter, items[asked])
        visited[items, step], predicted[items, step] = current, answers
        moved = answers != current
        items, current = items[moved], answers[moved]
        if not len(items):
            break
    return Retrieval(visited, predicted)
