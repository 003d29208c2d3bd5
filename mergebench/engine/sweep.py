"""Sweeps: all workers read every chunk once and replay the method up to its next question, or to its end.

for each group of units
    for each question of the method:  sample -> gather -> answer
    apply: sweep once more, write the result
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergebench.checkpoint.encode import NONE, Blocks, Rounding
from mergebench.checkpoint.files import Files
from mergebench.engine.batches import BATCH, Progress
from mergebench.engine.brackets import Miss, Sample
from mergebench.engine.executors import start_workers
from mergebench.engine.groups import Group, Unit
from mergebench.engine.inmemory import InMemory
from mergebench.engine.items import Item, items_of
from mergebench.engine.method import Tasks
from mergebench.engine.noise import TILE
from mergebench.engine.plan import Plan
from mergebench.engine.span import Span
from mergebench.engine.statistics import OrderStatistics, Statistic, encode
from mergebench.engine.worker import Known, context_of, replay_chunk

Missing = dict[int, list[dict[str, Any]]]  # the missing answers, by the number of the unit
SMALL = BATCH  # a unit of at most this many chunks may be gathered whole, by one worker
WIDE = 1 / 12  # share of a small unit in brackets above which gathering it whole is faster: its values are not sorted
LEAST_PIECES = 16
LEAST_SAMPLED, MOST_SAMPLED = 1 << 14, 1 << 19  # elements of a sample, so that its memory does not grow with the model


class Sweeper:
    """The sweeps of one run; `target`: receives the result instead of files."""

    def __init__(self, plan: Plan, files: Files, progress: Progress, target: InMemory | None = None) -> None:
        self.plan, self.files = plan, files
        self.rounded: dict[str, Rounding] = {}  # how far the values of tensors in eight or four bits were moved
        self.workers = start_workers(plan, files, progress, target)
        self.seconds = {"questions": 0.0, "apply": 0.0}
        self.extra_sweeps = 0  # because a bracket missed

    def close(self) -> None:
        self.workers.close()

    # -- questions -------------------------------------------------------------------------------

    def answer_at_once(self, group: Group, known: Known, numbers: Sequence[int]) -> Missing:
        """All missing answers about each of these units of one tile, encoded, with remarks."""
        started = time.perf_counter()
        items = items_of(self.plan, [(group.units[number].tensors[0], number) for number in numbers])
        found = self.workers.run("answer", items, group.units, known) if numbers else []
        answers = dict(itertools.chain.from_iterable(found))
        self.seconds["questions"] += time.perf_counter() - started
        return answers

    def answer(self, group: Group, known: Known, asked: Sequence[int]) -> dict[int, dict[str, Any]]:
        """The answer to the method's next question about each of the units numbered `asked`, encoded, with remarks."""
        started = time.perf_counter()
        statistics = {number: self._statistic(group.units[number], known[number]) for number in asked}
        answers: dict[int, dict[str, Any]] = {}
        attempt = 0
        while len(answers) < len(asked):
            open_units = [number for number in asked if number not in answers]
            ranked = [number for number in open_units if isinstance(statistics[number], OrderStatistics)]
            samples = self._samples(group, known, ranked, attempt)
            states = self._gather(group, known, statistics, open_units, samples)
            for number in open_units:
                statistic, state = statistics[number], states[number]
                with suppress(Miss):
                    answer = encode(statistic.finish(state))
                    answers[number] = answer | statistic.remarks(state, group.units[number].numel)
            attempt += 1
        self.extra_sweeps += max(attempt - 1, 0)
        self.seconds["questions"] += time.perf_counter() - started
        return answers

    def _statistic(self, unit: Unit, answers: Sequence[Any]) -> Statistic:
        """The next question about a unit, found from its first elements, since all elements get the same question."""
        name = next(name for name in unit.tensors if self._numel(name))
        size = (
            self._numel(name) if name in self.plan.whole else self._piece(unit) if self.plan.merge.cut == "row" else 1
        )
        values = torch.zeros(len(self.plan.merge.models), size, device=self.plan.device)
        statistic = replay_chunk(self.plan, values, context_of(self.plan, unit, (Span(name, 0, size),)), answers)
        assert isinstance(statistic, Statistic)
        return statistic

    def scales(self, known: Known) -> tuple[float, ...]:
        """The factors of the tasks; known: all answers about the first group."""
        unit = self.plan.groups[0].units[0]
        values = torch.zeros(len(self.plan.merge.models), 1, device=self.plan.device)
        tasks = replay_chunk(self.plan, values, context_of(self.plan, unit, (Span(unit.tensors[0], 0, 1),)), known[0])
        assert isinstance(tasks, Tasks)
        return tasks.scales

    def _gather(
        self,
        group: Group,
        known: Known,
        statistics: Mapping[int, Statistic],
        numbers: Sequence[int],
        samples: dict[int, Sample],
    ) -> dict[int, Any]:
        wholes = [self._whole_bytes(unit) for unit in group.units if self._is_small(unit)]  # one at a time
        room = self.plan.statistic_room // self.plan.workers - max(wholes, default=0)
        size = sum(unit.numel for unit in group.units)
        empty = {}
        for number in numbers:
            unit = group.units[number]
            tiles = sum(-(-self._numel(name) // TILE) for name in unit.tensors)
            sample, share = samples.pop(number, None), room * unit.numel // size
            asked = statistics[number]
            if sample is not None and isinstance(asked, OrderStatistics) and self._is_small(unit):
                sample = sample if asked.spread(sample, unit.numel) <= WIDE else None
            empty[number] = asked.init(unit.numel, tiles, sample, share)
        states: dict[int, Any] = {}
        tensors = ((name, number) for number in numbers for name in group.units[number].tensors)
        for mine in self.workers.run("gather", items_of(self.plan, tensors), group.units, known, empty):
            for number, state in mine.items():
                states[number] = statistics[number].combine(states[number], state) if number in states else state
        return states

    def _is_small(self, unit: Unit) -> bool:
        """Whether a unit fits into one worker's memory."""
        fits = self._whole_bytes(unit) <= self.plan.statistic_room // self.plan.workers // 2
        return unit.numel <= TILE or (fits and unit.numel <= SMALL * self.plan.chunk and len(unit.tensors) == 1)

    def _whole_bytes(self, unit: Unit) -> int:
        return 4 * unit.numel * len(self.plan.merge.models)

    # -- samples ---------------------------------------------------------------------------------

    def _samples(self, group: Group, known: Known, numbers: Sequence[int], attempt: int) -> dict[int, Sample]:
        """Sample the statistic's values, before a sweep, at pieces spread over each large unit."""
        batches = [
            (number, batch)
            for number in numbers
            if group.units[number].numel > TILE
            for batch in self._pieces(group.units[number], attempt)
        ]
        items = iter([Item(number, spans, place) for place, (number, spans) in enumerate(batches)])
        got = itertools.chain.from_iterable(self.workers.run("sample", items, group.units, known)) if batches else ()
        found: dict[int, list[Any]] = {}
        for _, number, values in sorted(got, key=lambda one: one[0]):
            found.setdefault(number, []).append(values)
        return {
            number: Sample(np.concatenate(parts, axis=1), self._piece(group.units[number]), margin=4.0**attempt)
            for number, parts in found.items()
        }

    def _pieces(self, unit: Unit, attempt: int) -> Iterator[tuple[Span, ...]]:
        """Batches of spans of equal size, in order, evenly spread with a jitter."""
        piece = self._piece(unit)
        size = min(max(unit.numel // 128, LEAST_SAMPLED), MOST_SAMPLED) * 2**attempt
        count = max(min(size, unit.numel // 2) // piece, min(unit.numel // piece, LEAST_PIECES))
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
            if self.plan.merge.cut == "row":
                start -= start % piece
            if batch and self.plan.merge.params_for(name) is not self.plan.merge.params_for(batch[0].tensor):
                yield tuple(batch)
                batch = []
            batch.append(Span(name, start, start + piece))
            if (len(batch) + 1) * piece > min(LEAST_SAMPLED, self.plan.chunk):
                yield tuple(batch)
                batch = []
        if batch:
            yield tuple(batch)

    # -- the result ------------------------------------------------------------------------------

    def apply(self, group: Group, known: Known, written: Sequence[str], directory: Path | None = None) -> Missing:
        """Merge (or copy) the tensors `written` into the shards in `directory`, or the target; known: all answers but
        those about units of one tile, which are found on the way and returned."""
        number_of = {name: number for number, unit in enumerate(group.units) for name in unit.tensors}
        items = items_of(self.plan, [(name, number_of.get(name, -1)) for name in written], apply=True)
        started = time.perf_counter()
        measured = [(name, number_of.get(name, -1)) for name in written if name in self.plan.measured]
        scales = self._scales(group, known, measured) if measured else {}
        answers: Missing = {}
        for found, rounded in self.workers.run("apply", items, group.units, known, directory, scales):
            answers |= dict(found)
            for name, change in rounded.items():
                self.rounded[name] = change + self.rounded.get(name, NONE)
        self.seconds["apply"] += time.perf_counter() - started
        return answers

    def _scales(self, group: Group, known: Known, tensors: Sequence[tuple[str, int]]) -> dict[str, torch.Tensor]:
        """The scales of tensors in eight bits, each given with its unit's number: they are merged once for them."""
        blocks: dict[str, list[Blocks]] = {name: [] for name, _ in tensors}
        items = items_of(self.plan, tensors, apply=True)
        for name, block in itertools.chain.from_iterable(self.workers.run("measure", items, group.units, known)):
            blocks[name].append(block)
        return {name: self.plan.measured[name].scales(self.files, found) for name, found in blocks.items()}

    def _piece(self, unit: Unit) -> int:
        """Length of a sampled piece: many short pieces over several tensors, fewer reads within one tensor."""
        if self.plan.merge.cut == "row":
            return (self.plan.merge.reference.tensors[unit.tensors[0]].shape or (1,))[-1]
        return 1024 if len(unit.tensors) == 1 else 128

    def _numel(self, name: str) -> int:
        return self.plan.merge.reference.tensors[name].numel
