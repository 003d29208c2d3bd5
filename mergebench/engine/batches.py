"""The chunks of a task in batches, and what hands them out."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from mergebench.checkpoint.files import Files
from mergebench.engine.items import Item
from mergebench.engine.plan import Plan

BATCH = 8  # chunks handed out at once; the kernel prefetches the next ones

Progress = Callable[[int], None]  # called with the bytes that were read


class Executor(Protocol):
    """The workers of one run."""

    def run(self, task: str, items: Iterator[Item], *arguments: Any) -> Iterable[Any]:
        """Run a task of `Worker` on batches of all items, each once; returns a result of each worker that took some."""

    def writing(self, directory: Path) -> AbstractContextManager[None]:
        """The context in which workers write into a directory."""

    def memory(self) -> int:
        """Peak bytes held by other processes."""

    def close(self) -> None: ...


class Batches:
    """The items of one task in batches, in order; taking a batch makes the kernel prefetch the next.

    size: items of a batch. files: None where the next batch is read on another machine.
    """

    def __init__(
        self, plan: Plan, files: Files | None, items: Iterator[Item], task: str, progress: Progress, size: int = BATCH
    ) -> None:
        self._plan, self._files, self._task, self._progress = plan, files, task, progress
        # one whole matrix may take seconds: a batch of them would keep one worker busy after the others are done
        self._size = 1 if plan.whole else size
        self._items, self._lock = items, threading.Lock()
        self._next = self._advised()

    def take(self) -> list[Item]:
        """The next batch; empty at the end."""
        with self._lock:
            batch = self._next
            if batch:
                self._next = self._advised()
                if self._task != "sample":  # sampling is not part of a sweep
                    self._progress(sum(self._bytes(item) for item in batch))
            return batch

    def _advised(self) -> list[Item]:
        batch = list(itertools.islice(self._items, self._size))
        if self._task == "gather" and len(batch) == self._size > 1:
            batch += self._rest_of(batch[-1].unit)
        if self._files is not None and self._task != "sample":  # samples are scattered
            advise(self._plan, self._files, batch)
        return batch

    def _rest_of(self, unit: int) -> list[Item]:
        """The next chunks up to the end of a unit: a small unit is gathered whole, so by one worker."""
        ahead = list(itertools.islice(self._items, BATCH))
        rest = list(itertools.takewhile(lambda item: item.unit == unit, ahead))
        if len(rest) == BATCH:  # a larger unit
            rest = []
        self._items = itertools.chain(ahead[len(rest) :], self._items)
        return rest

    def _bytes(self, item: Item) -> int:
        """Bytes read for a chunk; tensors that share one have the same types."""
        name, numel = item.spans[0].tensor, sum(span.numel for span in item.spans)
        info = self._plan.merge.reference.tensors[name]
        whole = info.nbytes if item.unit < 0 else self._plan.sweep_bytes(name, self._task in ("apply", "measure"))
        return whole * numel // info.numel


def advise(plan: Plan, files: Files, items: Iterable[Item]) -> None:
    """Make the kernel of this machine read the bytes of chunks that are merged soon."""
    for item in items:
        if item.unit >= 0:
            first, last = item.spans[0], item.spans[-1]
            for one, other in zip(plan.operands[first.tensor], plan.operands[last.tensor], strict=True):
                if one.stored is not None and other.stored is not None:
                    files.advise(one.stored, first.start, other.stored, last.stop)
