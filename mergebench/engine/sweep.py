"""Sweeps: every chunk read once, by all workers; the method replayed up to its next question, or to its end.

for each group of units
    for each question of the method:  sample -> sweep -> answer
    apply: sweep once more, write the result
"""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mergebench.checkpoint.read import TORCH_DTYPE, Files
from mergebench.engine.context import Context, Span
from mergebench.engine.noise import TILE
from mergebench.engine.plan import Group, Plan, Unit
from mergebench.engine.read import ChunkReader
from mergebench.engine.statistics import Miss, OrderStatistics, Sample, Statistic
from mergebench.engine.work import Item, Progress, Workers, chunks_of, copies_of
from mergebench.errors import RunError

SMALL = TILE  # a unit of at most this many elements is gathered whole
LEAST_SAMPLED, MOST_SAMPLED = 1 << 14, 1 << 20  # elements of a sample: its memory does not grow with the model


def replay(plan: Plan, values: Tensor, ctx: Context, answers: Sequence[Any]) -> Statistic | Tensor:
    """Run the method with the answers known so far: the next question, or the merged chunk."""
    running = plan.merge.method(values, plan.merge.params, ctx)
    if not inspect.isgenerator(running):
        return cast(Tensor, running)
    steps = cast("Generator[Statistic, Any, Tensor]", running)
    try:
        statistic = next(steps)
        for answer in answers:
            statistic = steps.send(answer)
    except StopIteration as end:
        return cast(Tensor, end.value)
    steps.close()
    return statistic


class Sweeper:
    """The workers of one run: their buffers, and the loops over chunks."""

    def __init__(self, plan: Plan, files: Files, progress: Progress) -> None:
        self.plan, self.files = plan, files
        self.workers = Workers(plan, files, progress)
        self.seconds = {"questions": 0.0, "apply": 0.0}
        self.extra_sweeps = 0  # because a bracket missed

    def close(self) -> None:
        self.workers.close()

    # -- questions -------------------------------------------------------------------------------

    def answer(self, group: Group, known: Sequence[Sequence[Any]]) -> tuple[list[Any], list[dict[str, Any]]]:
        """The answers to the method's next question, one for each unit of the group, and remarks on them.

        known: the answers so far, [unit][question].
        """
        started = time.perf_counter()
        answers: dict[int, Any] = {}
        remarks: dict[int, dict[str, Any]] = {}
        attempt = 0
        while len(answers) < len(group.units):
            open_units = [number for number in range(len(group.units)) if number not in answers]
            samples = self._samples(group, known, open_units, attempt)
            statistics, states = self._gather(group, known, open_units, samples)
            for number in open_units:
                with suppress(Miss):
                    answers[number] = to_device(self.plan.device, statistics[number].finish(states[number]))
                    remarks[number] = statistics[number].remarks(states[number])
            attempt += 1
        self.extra_sweeps += max(attempt - 1, 0)
        self.seconds["questions"] += time.perf_counter() - started
        order = range(len(group.units))
        return [answers[number] for number in order], [remarks[number] for number in order]

    def _gather(
        self, group: Group, known: Sequence[Sequence[Any]], numbers: Sequence[int], samples: dict[int, Sample]
    ) -> tuple[dict[int, Statistic], dict[int, Any]]:
        size = sum(unit.numel for unit in group.units)
        room = self.plan.statistic_room // (4 * self.plan.workers)
        statistics: dict[int, Statistic] = {}

        def work(reader: ChunkReader, items: Iterable[Item]) -> dict[int, Any]:
            mine: dict[int, Any] = {}
            for item in items:
                unit = group.units[item.unit]
                values, _ = reader.load(item.spans, apply=False)
                if not known[item.unit]:
                    self._check_finite(reader, item, values)
                statistic = replay(self.plan, values, self._context(unit, item.spans), known[item.unit])
                assert isinstance(statistic, Statistic), "the method asked fewer questions than it did on the toy chunk"
                if item.unit not in mine:
                    tiles = sum(-(-self._numel(name) // TILE) for name in unit.tensors)
                    share = room * unit.numel // size
                    mine[item.unit] = statistic.init(unit.numel, tiles, samples.get(item.unit), share)
                statistic.reduce(mine[item.unit], item.tile)
                statistic.values = values[:, :0]
                statistics[item.unit] = statistic
            return mine

        states: dict[int, Any] = {}
        for mine in self.workers.run(work, self._items(group, numbers)):
            for number, state in mine.items():
                states[number] = statistics[number].combine(states[number], state) if number in states else state
        return statistics, states

    def _samples(
        self, group: Group, known: Sequence[Sequence[Any]], numbers: Sequence[int], attempt: int
    ) -> dict[int, Sample]:
        """Before a sweep: the statistic's values at pieces spread over each large unit."""
        if self.plan.merge.method.cut != "element":
            return {}
        batches = [
            (number, batch)
            for number in numbers
            if group.units[number].numel > SMALL
            for batch in self._pieces(group.units[number], attempt)
        ]
        found: dict[int, list[Any]] = {number: [] for number, _ in batches}
        order = iter([Item(number, spans, place) for place, (number, spans) in enumerate(batches)])

        def work(reader: ChunkReader, items: Iterable[Item]) -> list[tuple[int, int, Any]]:
            got = []
            for item in items:
                values, _ = reader.load(item.spans, apply=False)
                context = self._context(group.units[item.unit], item.spans)
                statistic = replay(self.plan, values, context, known[item.unit])
                if isinstance(statistic, OrderStatistics):
                    got.append((item.tile, item.unit, statistic.keyed()))
            return got

        got = itertools.chain.from_iterable(self.workers.run(work, order))
        for _, number, values in sorted(got, key=lambda one: one[0]):
            found[number].append(values)
        return {
            number: Sample(np.concatenate(parts, axis=1), _piece(group.units[number]), margin=4.0**attempt)
            for number, parts in found.items()
            if parts
        }

    def _pieces(self, unit: Unit, attempt: int) -> Iterator[tuple[Span, ...]]:
        """Batches of spans of equal size, evenly spread with a jitter, in order of their place."""
        piece = _piece(unit)
        size = min(max(unit.numel // 512, LEAST_SAMPLED), MOST_SAMPLED) * 2**attempt
        count = min(size, unit.numel // 2) // piece
        ends = np.cumsum([self._numel(name) for name in unit.tensors])
        jitter = np.random.Generator(np.random.PCG64(attempt)).random(count)
        places = ((np.arange(count) + jitter) * (unit.numel / count)).astype(np.int64)
        batch: list[Span] = []
        for place, number in zip(places.tolist(), np.searchsorted(ends, places, side="right").tolist(), strict=True):
            name = unit.tensors[number]
            numel = self._numel(name)
            if numel < piece:
                continue
            start = min(place - (int(ends[number]) - numel), numel - piece)
            batch.append(Span(name, start, start + piece))
            if (len(batch) + 1) * piece > min(LEAST_SAMPLED // 2, self.plan.chunk):
                yield tuple(batch)
                batch = []
        if batch:
            yield tuple(batch)

    # -- the result ------------------------------------------------------------------------------

    def apply(self, group: Group, known: Sequence[Sequence[Any]], written: Sequence[str], write: Any) -> None:
        """Merge and write: `write(tensor, start, values)` gets flat values of the stored dtype.

        known: all answers, [unit][question]. written: the tensors of this group still to be written.
        """
        number_of = {name: number for number, unit in enumerate(group.units) for name in unit.tensors}
        takes_task_vectors = self.plan.merge.method.takes == "task_vectors"

        def work(reader: ChunkReader, items: Iterable[Item]) -> None:
            for item in items:
                (span,) = item.spans
                if item.unit < 0:
                    self._copy(span, write)
                    continue
                values, base = reader.load(item.spans, apply=True)
                if not self.plan.passes:
                    self._check_finite(reader, item, values)
                context = self._context(group.units[item.unit], item.spans)
                merged = replay(self.plan, values, context, known[item.unit])
                assert isinstance(merged, Tensor), "the method asked more questions than it did on the toy chunk"
                if merged.shape != base.shape or merged.dtype != torch.float32:
                    method = self.plan.merge.method.name
                    raise RunError(
                        f"method '{method}' gave {merged.dtype} {list(merged.shape)} for a chunk "
                        f"of {len(base)} elements, float32 [{len(base)}] was expected"
                    )
                if takes_task_vectors:
                    merged = merged + base
                stored = merged.to(TORCH_DTYPE[self.plan.dtypes[span.tensor]])
                if not math.isfinite(stored.sum(dtype=torch.float32)) and not torch.isfinite(stored).all():
                    raise self._overflow(reader, span)
                write(span.tensor, span.start, stored.cpu())

        items = (
            item
            for name in written
            for item in (
                chunks_of(self.plan, name, number_of[name]) if name in number_of else copies_of(self.plan, name)
            )
        )
        started = time.perf_counter()
        self.workers.run(work, items, apply=True)
        self.seconds["apply"] += time.perf_counter() - started

    def _copy(self, span: Span, write: Any) -> None:
        """Copy elements of a tensor that is not merged, converting a float to the stored type."""
        info = self.plan.merge.reference.tensors[span.tensor]
        values = torch.empty(span.numel, dtype=TORCH_DTYPE[info.dtype])
        self.files.read_elements(info, span.start, values)
        stored = values.to(TORCH_DTYPE[self.plan.dtypes[span.tensor]])
        if stored.dtype != values.dtype and not torch.equal(torch.isfinite(stored), torch.isfinite(values)):
            raise _does_not_fit(span.tensor, self.plan.dtypes[span.tensor])
        write(span.tensor, span.start, stored)

    def _overflow(self, reader: ChunkReader, span: Span) -> RunError:
        return reader.find_non_finite(span) or _does_not_fit(span.tensor, self.plan.dtypes[span.tensor])

    def _check_finite(self, reader: ChunkReader, item: Item, values: Tensor) -> None:
        """A sum shows a NaN or Inf at a thirtieth of the price of looking at each element."""
        if not math.isfinite(values.sum()):
            for span in item.spans:
                error = reader.find_non_finite(span)
                if error is not None:
                    raise error
            reader.load(item.spans, apply=True)  # it was the sum that overflowed

    # -- what is worked on -----------------------------------------------------------------------

    def _numel(self, name: str) -> int:
        return self.plan.merge.reference.tensors[name].numel

    def _context(self, unit: Unit, spans: tuple[Span, ...]) -> Context:
        merge, aliases = self.plan.merge, self.plan.alignment.aliases
        shape = merge.reference.tensors[spans[0].tensor].shape
        if aliases:  # tied tensors that are stored twice draw the same noise, and stay equal
            spans = tuple(span._replace(tensor=aliases.get(span.tensor, span.tensor)) for span in spans)
        return Context(unit.numel, merge.names, spans, shape, merge.scope, merge.seed, self.plan.device)

    def _items(self, group: Group, numbers: Sequence[int]) -> Iterator[Item]:
        for number in numbers:
            tile = 0
            for name in group.units[number].tensors:
                yield from chunks_of(self.plan, name, number, tile)
                tile += -(-self._numel(name) // TILE)


def _does_not_fit(tensor: str, dtype: str) -> RunError:
    return RunError(f"{tensor}: the merged values do not fit into {dtype}", "store them as float32: dtype: float32")


def _piece(unit: Unit) -> int:
    """Consecutive elements in a sample: many short pieces where tensors differ, fewer reads within one."""
    return 512 if len(unit.tensors) == 1 else 128


def to_device(device: torch.device, answer: Any) -> Any:
    """An answer where the chunks are."""
    if device.type == "cpu":
        return answer
    return tuple(part.to(device) for part in answer) if isinstance(answer, tuple) else answer
