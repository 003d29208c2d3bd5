"""Workers process one chunk at a time. Each thread or process of a run has one worker with its own buffers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergebench.checkpoint.encode import NONE, Blocks, Rounding
from mergebench.checkpoint.files import TORCH_DTYPE, Files
from mergebench.checkpoint.header import FP8
from mergebench.checkpoint.shards import ShardFiles
from mergebench.engine.brackets import Floats
from mergebench.engine.context import Context
from mergebench.engine.groups import Unit
from mergebench.engine.inmemory import InMemory
from mergebench.engine.items import Item
from mergebench.engine.machine import unshared_memory
from mergebench.engine.method import Tasks
from mergebench.engine.on_data import DataReader, toy
from mergebench.engine.plan import Plan
from mergebench.engine.profile import Counts, counts
from mergebench.engine.read import ChunkReader
from mergebench.engine.replay import replay
from mergebench.engine.span import Span
from mergebench.engine.statistics import OrderStatistics, Statistic, decode
from mergebench.errors import RunError

Known = Sequence[Sequence[Mapping[str, Any]]]  # the answers so far, [unit][question], encoded
Merged = tuple[Tensor, Sequence[Tensor]]  # a chunk, and the tasks' masks
Found = list[tuple[int, list[dict[str, Any]]]]  # the number of a unit, and the answers that were missing


def replay_chunk(
    plan: Plan,
    values: Tensor,
    ctx: Context,
    answers: Sequence[Mapping[str, Any]],
    answer: Callable[[Statistic], Any] | None = None,
) -> Statistic | Tensor | Tasks:
    """Run the method with known answers: its next question, or the merged chunk; `answer` answers further questions."""
    known = [decode(one, plan.device) for one in answers]
    return replay(plan.merge.method, values, plan.merge.params_for(ctx.spans[0].tensor), ctx, known, answer)


def context_of(plan: Plan, unit: Unit, spans: tuple[Span, ...], reader: DataReader | None = None) -> Context:
    """The context of a chunk; without a reader of statistics, those of a toy."""
    merge, aliases = plan.merge, plan.alignment.aliases
    shape = merge.reference.tensors[spans[0].tensor].shape
    on_data = reader.read(spans) if reader else toy(merge, shape, sum(one.numel for one in spans), plan.device)
    if aliases:  # tied tensors stored twice must draw the same noise to stay equal
        spans = tuple(span._replace(tensor=aliases.get(span.tensor, span.tensor)) for span in spans)
    return Context(unit.numel, merge.names, spans, shape, merge.scope, merge.seed, plan.device, on_data)


class Worker:
    """Tasks over a stream of chunks: `sample` and `gather` before an answer, `apply` after the last; `profile`."""

    def __init__(self, plan: Plan, files: Files, target: InMemory | None = None) -> None:
        self.plan, self.files = plan, files
        self.reader = ChunkReader(plan, files)
        self._context = partial(context_of, plan, reader=DataReader(plan.merge, plan.on_data, files, plan.device))
        self._copies = plan.merge.reference.values(files)
        self._outputs: list[ShardFiles | InMemory] = [] if target is None else [target]  # then each task's masks
        self._peak = 0

    def close(self) -> None:
        for output in self._outputs:
            output.close()

    def sample(self, items: Iterable[Item], units: Sequence[Unit], known: Known) -> list[tuple[int, int, Floats]]:
        """(place, unit, values) of an order statistic at the sampled pieces of each item."""
        found = []
        for item in items:
            values, _ = self.reader.load(item.spans, apply=False)
            context = self._context(units[item.unit], item.spans)
            statistic = replay_chunk(self.plan, values, context, known[item.unit])
            assert isinstance(statistic, OrderStatistics)
            found.append((item.tile, item.unit, statistic.keyed()))
        return found

    def gather(
        self, items: Iterable[Item], units: Sequence[Unit], known: Known, empty: dict[int, Any]
    ) -> dict[int, Any]:
        """The state of each unit's next statistic over this worker's chunks."""
        states = copy.deepcopy(empty)  # all before the first chunk: small things that live long, made amid the chunks'
        for item in items:  # temporaries, would split the memory that those use again and again
            values, _ = self.reader.load(item.spans, apply=False, alike=True)
            if not known[item.unit]:
                self._check_finite(item, values)
            context = self._context(units[item.unit], item.spans)
            statistic = replay_chunk(self.plan, values, context, known[item.unit])
            assert isinstance(statistic, Statistic), "the method asked fewer questions than it did on the toy chunk"
            several = len(item.spans) > 1
            statistic.reduce(states[item.unit], item.tile, [span.numel for span in item.spans] if several else ())
        return states

    def answer(self, items: Iterable[Item], units: Sequence[Unit], known: Known) -> Found:
        """The missing answers about each unit; a unit is one tensor of one tile."""
        found: Found = []
        for item in items:
            values, _ = self.reader.load(item.spans, apply=False, alike=True)
            self._finish(item, values, units, known, found)
        return found

    def measure(self, items: Iterable[Item], units: Sequence[Unit], known: Known) -> list[tuple[str, Blocks]]:
        """What the scales of tensors in eight bits depend on, by the chunk; each chunk is merged, or copied."""
        found = []
        for item in items:
            span = item.spans[0]
            values = self._to_encode(item, units, known, [])
            found.append((span.tensor, self.plan.measured[span.tensor].measure(self.files, span.start, values)))
        return found

    def apply(
        self,
        items: Iterable[Item],
        units: Sequence[Unit],
        known: Known,
        directory: Path | None,
        scales: Mapping[str, Tensor],
    ) -> tuple[Found, dict[str, Rounding]]:
        """Merge or copy, and write into the shards in `directory`, or into the target.

        scales: of the tensors that were measured. Returns the missing answers, of units of one tile, and how far the
        values of tensors in eight or four bits were moved.
        """
        found: Found = []
        rounded: dict[str, Rounding] = {}
        if directory is not None and not self._outputs:
            columns = zip(*(shard.files for shard in self.plan.shards), strict=True)
            self._outputs = [ShardFiles(directory, column) for column in columns]
        output, *tasks = self._outputs
        for item in items:
            span = item.spans[0]
            masks: Sequence[Tensor] = ()
            encoding = self.plan.encoded.tensors.get(span.tensor)
            if encoding is not None:
                assert isinstance(output, ShardFiles), "what is measured in memory is not rounded"
                values = self._to_encode(item, units, known, found)
                strips, change = encoding.encode(self.files, span.start, values, scales.get(span.tensor))
                for strip in strips:
                    output.write_rows(*strip)
                rounded[span.tensor] = change + rounded.get(span.tensor, NONE)
                continue
            if item.unit < 0:
                stored = self._copied(span)
            else:
                stored, masks = self._merged(item, units, known, found)
            if len(item.spans) > 1:
                output.write_all([(one.tensor, one.numel) for one in item.spans], stored)
                continue
            output.write(span.tensor, span.start, stored)
            for task, mask in zip(tasks, masks, strict=item.unit >= 0):
                task.write(span.tensor, span.start // 8, mask)
        return found, rounded

    def profile(
        self, items: Iterable[Item], units: Sequence[Unit], known: Known, replayed: bool
    ) -> list[tuple[str, int, Counts]]:
        """(tensor, first element, counts) of each chunk; `replayed`: include counts that need the method's result."""
        found = []
        method = self.plan.merge.method if replayed else None
        for item in items:
            (span,) = item.spans
            values, _ = self.reader.load(item.spans, apply=False)
            context = self._context(units[item.unit], item.spans)
            params = self.plan.merge.params_for(span.tensor)
            answers = [decode(answer, self.plan.device) for answer in known[item.unit]]
            found.append((span.tensor, span.start, counts(method, values, params, context, answers)))
        return found

    def _to_encode(self, item: Item, units: Sequence[Unit], known: Known, found: Found) -> Tensor:
        """The values of a chunk that is written in eight or four bits, float32."""
        values = self._copied(item.spans[0]) if item.unit < 0 else self._result_of(item, units, known, found)[0].float()
        if not math.isfinite(values.sum()) and not torch.isfinite(values).all():
            if item.unit < 0:
                raise RunError(f"{item.spans[0].tensor}: the base's has a value that is not finite")
            self._check_stored(item, values, "F32")
        return values

    def _merged(self, item: Item, units: Sequence[Unit], known: Known, found: Found) -> Merged:
        """The merged chunk in its stored type; for tasks, the vector, and the masks as bits."""
        merged, masks = self._result_of(item, units, known, found)
        dtype = self.plan.dtypes[item.spans[0].tensor]
        stored = merged.to(TORCH_DTYPE[dtype])
        if not math.isfinite(stored.sum(dtype=torch.float32)):
            self._check_stored(item, stored, dtype)
        return stored.cpu(), masks

    def _result_of(self, item: Item, units: Sequence[Unit], known: Known, found: Found) -> Merged:
        """The merged chunk in float32, or as all models store it; for tasks, the vector, and the masks as bits."""
        masks: Sequence[Tensor] = ()
        name = item.spans[0].tensor
        merged = self.reader.unchanged(item.spans) if self.plan.keeps(name) else None
        if merged is None:
            values, base = self.reader.load(item.spans, apply=True, alike=True)
            parts = self._finish(item, values, units, known, found)
            merged = parts[0] if len(parts) == 1 else torch.cat(parts)
            if isinstance(merged, Tasks):
                bits = np.packbits(merged.masks.cpu().numpy(), axis=1, bitorder="little")
                merged, masks = merged.vector, torch.from_numpy(bits).unbind()
            if self.plan.merge.onto_base:
                merged = merged + base
        return merged, masks

    def _finish(self, item: Item, values: Tensor, units: Sequence[Unit], known: Known, found: Found) -> list[Any]:
        """The method's result on a chunk, part by part if it sees the tensors apart; adds the missing answers."""
        if len(item.spans) == 1 or self.plan.blind:
            parts = [(item.spans, values)]
        else:
            pieces = torch.split(values, [span.numel for span in item.spans], dim=1)
            parts = [((span,), piece.contiguous()) for span, piece in zip(item.spans, pieces, strict=True)]
        if not all(known[item.unit : item.unit + len(parts)]):
            self._check_finite(item, values)
        return [
            self._result(number, *part, units[number], known[number], found)
            for number, part in enumerate(parts, item.unit)
        ]

    def _result(
        self, number: int, spans: tuple[Span, ...], values: Tensor, unit: Unit, known: Sequence[Any], found: Found
    ) -> Tensor | Tasks:
        """The method's result, float32 [elements] or `Tasks`; what is not known, it is told here."""
        told: list[dict[str, Any]] = []

        def answer(statistic: Statistic) -> Any:
            assert len(known) + len(told) < unit.passes, "the method asked more questions than it did on the toy chunk"
            told.append(statistic.at_once())
            return decode(told[-1], self.plan.device)

        merged = replay_chunk(self.plan, values, self._context(unit, spans), known, answer)
        if told:
            found.append((number, told))
        assert not isinstance(merged, Statistic)
        vector, numel = merged.vector if isinstance(merged, Tasks) else merged, values.shape[1]
        if vector.shape != (numel,) or vector.dtype != torch.float32:
            raise RunError(
                f"method '{self.plan.merge.method.name}' gave {vector.dtype} {list(vector.shape)} for a chunk "
                f"of {numel} elements, float32 [{numel}] was expected"
            )
        return merged

    def _check_stored(self, item: Item, stored: Tensor, dtype: str) -> None:
        """Raise an error if a merged value is not finite."""
        for span, part in zip(item.spans, torch.split(stored, [span.numel for span in item.spans]), strict=True):
            if torch.isfinite(part).all():
                continue
            error = self._find_non_finite(span)
            if error is None and torch.isnan(part).any():
                method = self.plan.merge.method.name
                error = RunError(f"{span.tensor}: '{method}' makes nan of finite values", "exclude the tensor")
            raise error or _does_not_fit(span.tensor, dtype)

    def _copied(self, span: Span) -> Tensor:
        """Elements of a tensor that is not merged; floats are converted to the stored type."""
        info, deltas = self.plan.base_of(span.tensor)
        if deltas or (info.dtype in FP8 and self.plan.dtypes[span.tensor] != info.dtype):
            values = torch.empty(span.numel)
            self._copies.read(span.tensor, span.start, values)
        else:
            values = torch.empty(span.numel, dtype=TORCH_DTYPE[info.dtype])
            self.files.read_elements(info, span.start, values)
        stored = values.to(TORCH_DTYPE[self.plan.dtypes[span.tensor]])
        if stored.dtype != values.dtype and not torch.equal(torch.isfinite(stored), torch.isfinite(values)):
            raise _does_not_fit(span.tensor, self.plan.dtypes[span.tensor])
        return stored

    def note_memory(self) -> None:
        """Record the peak of this process's unshared memory."""
        self._peak = max(self._peak, unshared_memory())

    def peak_memory(self, items: Iterable[Item]) -> int:
        """Peak bytes of this process's unshared memory."""
        return self._peak

    # -- values that are no numbers ----------------------------------------------------------------

    def _check_finite(self, item: Item, values: Tensor) -> None:
        """Check the sum, which shows a NaN or Inf at a thirtieth of the cost of checking each element."""
        if not math.isfinite(values.sum()):
            for span in item.spans:
                error = self._find_non_finite(span)
                if error is not None:
                    raise error
            self.reader.load(item.spans, apply=True, alike=True)  # no element is at fault: the sum overflowed

    def _find_non_finite(self, span: Span) -> RunError | None:
        """The error that names the model and the place of a non-finite value; None if only the sum overflowed."""
        merge = self.plan.merge
        sources = [(merge.reference, merge.reference.tensors[span.tensor])]
        sources += list(zip(merge.models, self.plan.alignment.sources[span.tensor], strict=True))
        for model, info in sources:
            stored = torch.empty(span.numel, dtype=TORCH_DTYPE[info.dtype])
            self.files.read_elements(info, span.start, stored)
            bad = torch.nonzero(~torch.isfinite(stored.float()))
            if len(bad):
                first = int(bad[0])
                place = torch.unravel_index(torch.tensor(span.start + first), info.shape) if info.shape else ()
                return RunError(
                    f"{span.tensor}: {model.reference} has {stored[first].item()} at {[int(i) for i in place]}",
                    "a merge with it would be broken: use another checkpoint, or exclude the tensor",
                )
        values, _ = self.reader.load([span], apply=False)
        for name, row in zip(merge.names, values, strict=True):
            bad = row[~torch.isfinite(row)]
            if len(bad):  # from an adapter's product, or an overflow of the subtraction
                return RunError(f"{span.tensor}: what {name} makes of it has {bad[0].item()}", "use another checkpoint")
        return None


def _does_not_fit(tensor: str, dtype: str) -> RunError:
    return RunError(f"{tensor}: the merged values do not fit into {dtype}", "store them as float32: dtype: float32")
