"""Pieces of work, and the threads that do them: chunks in file order, the next ones already asked for."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch

from mergebench.checkpoint.read import Files
from mergebench.engine.context import Span
from mergebench.engine.noise import TILE
from mergebench.engine.plan import Plan
from mergebench.engine.read import ChunkReader

AHEAD = 16  # chunks the kernel is told of before they are needed
COPIED = 16 * TILE  # elements of a piece that is only copied

Progress = Callable[[int], None]  # called with the bytes that were read


class Item(NamedTuple):
    """One chunk of work: columns of the unit numbered `unit`, the first being in its tile `tile`."""

    unit: int
    spans: tuple[Span, ...]
    tile: int


def chunks_of(plan: Plan, name: str, unit: int, tile: int = 0) -> Iterator[Item]:
    """A merged tensor in chunks; `tile` is the number of its first tile in the unit."""
    info, size = plan.merge.reference.tensors[name], plan.chunk
    if plan.merge.method.cut == "row":
        columns = info.shape[-1] if info.shape else 1
        size = max(size // max(columns, 1), 1) * columns
    for start in range(0, info.numel, size):
        yield Item(unit, (Span(name, start, min(start + size, info.numel)),), tile + start // TILE)


def copies_of(plan: Plan, name: str) -> Iterator[Item]:
    """A tensor that is copied, in pieces."""
    numel = plan.merge.reference.tensors[name].numel
    for start in range(0, numel, COPIED):
        yield Item(-1, (Span(name, start, min(start + COPIED, numel)),), 0)


class Workers:
    """The threads of one run, each with its buffers."""

    def __init__(self, plan: Plan, files: Files, progress: Progress) -> None:
        self._plan, self._files, self._progress = plan, files, progress
        self._readers = [ChunkReader(plan, files) for _ in range(plan.workers)]
        self._pool = ThreadPoolExecutor(plan.workers, "worker", initializer=torch.set_num_threads, initargs=(1,))
        self._stop = threading.Event()

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True)

    def run(self, work: Callable[..., Any], items: Iterator[Item], *, apply: bool = False) -> list[Any]:
        """Let all workers take items until there are none; their results in the order of the workers."""
        shared = _Shared(items, self._stop, self._advise, partial(self._count, apply))

        def loop(reader: ChunkReader) -> Any:
            on_gpu = self._plan.device.type == "cuda"  # a stream of its own: workers copy and compute side by side
            stream = torch.cuda.stream(torch.cuda.Stream()) if on_gpu else nullcontext()  # type: ignore[no-untyped-call]
            try:
                with torch.inference_mode(), stream:
                    return work(reader, shared)
            except BaseException:
                self._stop.set()
                raise

        futures = [self._pool.submit(loop, reader) for reader in self._readers]
        try:
            return [future.result() for future in futures]
        except BaseException:
            self._stop.set()
            for future in futures:
                future.exception()
            raise

    def _advise(self, batch: list[Item]) -> None:
        spans = [item.spans[0] for item in batch if item.unit >= 0 and len(item.spans) == 1]  # no scattered samples
        for name, group in itertools.groupby(spans, key=lambda span: span.tensor):
            pieces = list(group)
            for operand in self._plan.operands[name]:
                if operand.stored is not None:
                    self._files.advise(operand.stored, pieces[0].start, pieces[-1].stop)

    def _count(self, apply: bool, item: Item) -> None:
        for span in item.spans:
            numel = self._plan.merge.reference.tensors[span.tensor].numel
            if item.unit < 0:
                whole = self._plan.merge.reference.tensors[span.tensor].nbytes
            else:
                whole = self._plan.sweep_bytes(span.tensor, apply)
            self._progress(whole * span.numel // numel)


class _Shared:
    """One iterator for all workers; the kernel is told of the next batch while this one is worked on."""

    def __init__(
        self,
        items: Iterator[Item],
        stop: threading.Event,
        advise: Callable[[list[Item]], None],
        count: Callable[[Item], None],
    ) -> None:
        self._items, self._advise, self._stop, self._count = items, advise, stop, count
        self._lock = threading.Lock()
        self._now: list[Item] = []
        self._next = self._batch()

    def _batch(self) -> list[Item]:
        batch = list(itertools.islice(self._items, AHEAD))
        self._advise(batch)
        return batch[::-1]

    def __iter__(self) -> Iterator[Item]:
        while not self._stop.is_set():
            with self._lock:
                if not self._now:
                    self._now, self._next = self._next, self._batch()
                    if not self._now:
                        return
                item = self._now.pop()
                self._count(item)
            yield item
