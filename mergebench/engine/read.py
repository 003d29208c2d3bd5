"""Fill a chunk: stored values, minus the base, plus low-rank differences, as float32 on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.read import TORCH_DTYPE, Files, LowRankReader
from mergebench.engine.context import Span
from mergebench.engine.merge import Operand
from mergebench.engine.plan import Plan
from mergebench.errors import RunError


class ChunkReader:
    """One worker's buffers, reused for every chunk it reads."""

    def __init__(self, plan: Plan, files: Files) -> None:
        self.plan, self.files = plan, files
        rows, pinned = len(plan.merge.models), plan.device.type == "cuda"
        self._values = torch.empty(rows * plan.chunk, dtype=torch.float32, device=plan.device)
        self._base = torch.empty(plan.chunk, dtype=torch.float32, device=plan.device)
        self._raw = [torch.empty(plan.chunk * 8, dtype=torch.uint8, pin_memory=pinned) for _ in range(rows + 1)]
        self._low_rank: dict[tuple[str, int], LowRankReader] = {}

    def load(self, spans: Sequence[Span], apply: bool) -> tuple[Tensor, Tensor]:
        """(values [models, elements], base [elements]); the base is only filled where it is needed."""
        numel = sum(span.numel for span in spans)
        values = self._values[: len(self.plan.merge.models) * numel].view(-1, numel)
        base = self._base[:numel]
        at = 0
        for span in spans:
            self._fill(span, values[:, at : at + span.numel], base[at : at + span.numel], apply)
            at += span.numel
        return values, base

    def _fill(self, span: Span, values: Tensor, base: Tensor, apply: bool) -> None:
        if self.plan.needs_base(span.tensor, apply):
            self._stored(self.plan.merge.reference.tensors[span.tensor], span.start, base, self._raw[-1])
        for number, operand in enumerate(self.plan.operands[span.tensor]):
            row = values[number]
            if operand.stored is None:
                row.zero_()
            else:
                self._stored(operand.stored, span.start, row, self._raw[number])
            if operand.base:
                row.add_(base) if operand.base > 0 else row.sub_(base)
            if operand.low_rank is not None:
                self._add_low_rank(span, number, operand, row)

    def _stored(self, tensor: TensorInfo, start: int, out: Tensor, raw: Tensor) -> None:
        dtype = TORCH_DTYPE[tensor.dtype]
        if dtype == torch.float32 and out.device.type == "cpu":
            self.files.read_elements(tensor, start, out)
            return
        stored = raw[: len(out) * dtype.itemsize].view(dtype)
        self.files.read_elements(tensor, start, stored)
        out.copy_(stored.to(out.device, non_blocking=True))

    def _add_low_rank(self, span: Span, number: int, operand: Operand, row: Tensor) -> None:
        key = (span.tensor, number)
        if key not in self._low_rank:
            self._low_rank = {k: v for k, v in self._low_rank.items() if k[0] == span.tensor}
            assert operand.low_rank is not None
            self._low_rank[key] = LowRankReader(self.files, operand.low_rank)
        if row.device.type == "cpu":
            self._low_rank[key].add_into(span.start, row)
        else:
            delta = torch.zeros(len(row))
            self._low_rank[key].add_into(span.start, delta)
            row.add_(delta.to(row.device))

    def find_non_finite(self, span: Span) -> RunError | None:
        """The error that names the model and the place of a non-finite value, or None: it was an overflow
        of the sum that raised the suspicion."""
        merge = self.plan.merge
        sources = [(merge.reference, merge.reference.tensors[span.tensor])]
        sources += list(zip(merge.models, self.plan.alignment.sources[span.tensor], strict=True))
        row = torch.empty(span.numel)
        for model, info in sources:
            stored = torch.empty(span.numel, dtype=TORCH_DTYPE[info.dtype])
            self.files.read_elements(info, span.start, stored)
            row.copy_(stored)
            bad = torch.nonzero(~torch.isfinite(row))
            if len(bad):
                first = int(bad[0])
                place = [int(i) for i in np.unravel_index(span.start + first, info.shape)] if info.shape else []
                return RunError(
                    f"{span.tensor}: {model.reference} has {row[first].item()} at {place}",
                    "a merge with it would be broken: use another checkpoint, or exclude the tensor",
                )
        values, _ = self.load([span], apply=False)
        for name, row in zip(merge.names, values, strict=True):
            bad = row[~torch.isfinite(row)]
            if len(bad):  # an adapter's product, or an overflow of the subtraction
                return RunError(f"{span.tensor}: what {name} makes of it has {bad[0].item()}", "use another checkpoint")
        return None
