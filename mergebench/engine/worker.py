"""Workers process one chunk at a time. Each thread or process of a run has one worker with its own buffers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mergebench.checkpoint.files import TORCH_DTYPE, Files
from mergebench.checkpoint.header import FP8
from mergebench.checkpoint.shards import ShardFiles
from mergebench.engine.brackets import Floats
from mergebench.engine.context import Context
from mergebench.engine.inmemory import InMemory
from mergebench.engine.method import Tasks
from mergebench.engine.plan import Plan, Unit
from mergebench.engine.profile import Counts, counts
from mergebench.engine.read import ChunkReader
from mergebench.engine.replay import replay
from mergebench.engine.span import Span
from mergebench.engine.statistics import OrderStatistics, Statistic
from mergebench.errors import RunError

Known = Sequence[Sequence[Any]]  # the answers so far, [unit][question]


class Item(NamedTuple):
    """One chunk of work: elements of the unit numbered `unit` (-1: to be copied), starting at its tile `tile`."""

    unit: int
    spans: tuple[Span, ...]
    tile: int


def replay_chunk(plan: Plan, values: Tensor, ctx: Context, answers: Sequence[Any]) -> Statistic | Tensor | Tasks:
    """Run the method with the answers known so far; returns the next question, or the merged chunk."""
    return replay(plan.merge.method, values, plan.merge.params_for(ctx.spans[0].tensor), ctx, answers)


def context_of(plan: Plan, unit: Unit, spans: tuple[Span, ...]) -> Context:
    """The context of a chunk."""
    merge, aliases = plan.merge, plan.alignment.aliases
    shape = merge.reference.tensors[spans[0].tensor].shape
    if aliases:  # tied tensors stored twice must draw the same noise to stay equal
        spans = tuple(span._replace(tensor=aliases.get(span.tensor, span.tensor)) for span in spans)
    return Context(unit.numel, merge.names, spans, shape, merge.scope, merge.seed, plan.device)


class Worker:
    """Tasks over a stream of chunks: `sample` and `gather` before an answer, `apply` after the last; `profile`."""

    def __init__(self, plan: Plan, files: Files, target: InMemory | None = None) -> None:
        self.plan, self.files = plan, files
        self.reader = ChunkReader(plan, files)
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
            context = context_of(self.plan, units[item.unit], item.spans)
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
            values, _ = self.reader.load(item.spans, apply=False)
            if not known[item.unit]:
                self._check_finite(item, values)
            context = context_of(self.plan, units[item.unit], item.spans)
            statistic = replay_chunk(self.plan, values, context, known[item.unit])
            assert isinstance(statistic, Statistic), "the method asked fewer questions than it did on the toy chunk"
            statistic.reduce(states[item.unit], item.tile)
        return states

    def apply(self, items: Iterable[Item], units: Sequence[Unit], known: Known, directory: Path | None) -> None:
        """Merge or copy, and write into the shards in `directory`, or into the target."""
        if directory is not None and not self._outputs:
            columns = zip(*(shard.files for shard in self.plan.shards), strict=True)
            self._outputs = [ShardFiles(directory, column) for column in columns]
        output, *tasks = self._outputs
        for item in items:
            (span,) = item.spans
            masks: Sequence[Tensor] = ()
            if item.unit < 0:
                stored = self._copied(span)
            else:
                stored, masks = self._merged(item, units[item.unit], known[item.unit])
            output.write(span.tensor, span.start, stored)
            for task, mask in zip(tasks, masks, strict=item.unit >= 0):
                task.write(span.tensor, span.start // 8, mask)

    def profile(
        self, items: Iterable[Item], units: Sequence[Unit], known: Known, replayed: bool
    ) -> list[tuple[str, int, Counts]]:
        """(tensor, first element, counts) of each chunk; `replayed`: include counts that need the method's result."""
        found = []
        method = self.plan.merge.method if replayed else None
        for item in items:
            (span,) = item.spans
            values, _ = self.reader.load(item.spans, apply=False)
            context = context_of(self.plan, units[item.unit], item.spans)
            params = self.plan.merge.params_for(span.tensor)
            found.append((span.tensor, span.start, counts(method, values, params, context, known[item.unit])))
        return found

    def _merged(self, item: Item, unit: Unit, answers: Sequence[Any]) -> tuple[Tensor, Sequence[Tensor]]:
        """The merged chunk in its stored type; for tasks, the vector, and the masks as bits."""
        (span,) = item.spans
        values, base = self.reader.load(item.spans, apply=True)
        if not unit.passes:
            self._check_finite(item, values)
        merged = replay_chunk(self.plan, values, context_of(self.plan, unit, item.spans), answers)
        assert not isinstance(merged, Statistic), "the method asked more questions than it did on the toy chunk"
        masks: Sequence[Tensor] = ()
        if isinstance(merged, Tasks):
            bits = np.packbits(merged.masks.cpu().numpy(), axis=1, bitorder="little")
            merged, masks = merged.vector, torch.from_numpy(bits).unbind()
        method = self.plan.merge.method
        if merged.shape != base.shape or merged.dtype != torch.float32:
            raise RunError(
                f"method '{method.name}' gave {merged.dtype} {list(merged.shape)} for a chunk "
                f"of {len(base)} elements, float32 [{len(base)}] was expected"
            )
        if self.plan.merge.onto_base:
            merged = merged + base
        stored = merged.to(TORCH_DTYPE[self.plan.dtypes[span.tensor]])
        if not math.isfinite(stored.sum(dtype=torch.float32)) and not torch.isfinite(stored).all():
            error = self._find_non_finite(span)
            if error is None and torch.isnan(stored).any():
                error = RunError(f"{span.tensor}: '{method.name}' makes nan of finite values", "exclude the tensor")
            raise error or _does_not_fit(span.tensor, self.plan.dtypes[span.tensor])
        return stored.cpu(), masks

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
        with suppress(OSError):  # some sandboxes hide it
            rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
            private = sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Private_"))
            self._peak = max(self._peak, private)

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
            self.reader.load(item.spans, apply=True)  # no element is at fault: the sum overflowed

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
