"""Fill a chunk: stored values with their deltas, minus the base, as float32 on the device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import cast

import torch
from torch import Tensor

from mergebench.checkpoint.delta import Chain, Delta
from mergebench.checkpoint.files import TORCH_DTYPE, Files
from mergebench.checkpoint.fp8 import Scales
from mergebench.checkpoint.header import FP8, TensorInfo
from mergebench.checkpoint.values import chain
from mergebench.engine.job import Operand
from mergebench.engine.plan import Plan
from mergebench.engine.span import Span

BASE = -1  # the base's number among the models


class ChunkReader:
    """One worker's buffers, reused for every chunk it reads."""

    def __init__(self, plan: Plan, files: Files) -> None:
        self.plan, self.files = plan, files
        rows, pinned = len(plan.merge.models), plan.device.type == "cuda"
        self._values = torch.empty(rows * plan.longest, dtype=torch.float32, device=plan.device)
        self._base = torch.empty(plan.longest, dtype=torch.float32, device=plan.device)
        self._raw = torch.empty((rows + 1) * plan.longest * 8, dtype=torch.uint8, pin_memory=pinned)
        self._bytes = self._raw.numpy().data  # the same memory: slicing it is quicker than slicing a tensor
        self._chains: dict[tuple[str, int], Chain] = {}
        self._scales = Scales(files)

    def load(self, spans: Sequence[Span], apply: bool) -> tuple[Tensor, Tensor]:
        """(values [models, elements], base [elements]); the base is only filled if it is needed."""
        numel = sum(span.numel for span in spans)
        values = self._values[: len(self.plan.merge.models) * numel].view(-1, numel)
        base = self._base[:numel]
        at = 0
        for name, group in groupby(spans, key=lambda span: span.tensor):
            pieces = list(group)
            stop = at + sum(span.numel for span in pieces)
            self._fill(name, pieces, values[:, at:stop], base[at:stop], at, apply)
            at = stop
        return values, base

    def _fill(self, name: str, pieces: Sequence[Span], values: Tensor, base: Tensor, column: int, apply: bool) -> None:
        """Pieces of one tensor, `column` of the chunk onwards. Models stored in the same way share the calls: on a
        chunk in the cache, a call costs as much as its arithmetic."""
        if self.plan.needs_base(name, apply):
            stored, deltas = self.plan.base_of(name)
            if deltas:
                at = 0
                for span in pieces:
                    self._chain(name, BASE, stored, deltas).read(span.start, base[at : at + span.numel])
                    at += span.numel
            else:
                self._stored([stored], pieces, base[None], len(values), column)
        at = 0
        for (dtype, folds, sign), group in groupby(self.plan.operands[name], key=_kind):
            operands = list(group)
            rows = values[at : at + len(operands)]
            if dtype is None:
                rows.zero_()
            elif not folds:
                self._stored([cast(TensorInfo, operand.stored) for operand in operands], pieces, rows, at, column)
            for number, operand in enumerate(operands, at):
                if operand.added:
                    self._add_deltas(name, number, operand, pieces, values[number])
            if sign:
                rows.add_(base) if sign > 0 else rows.sub_(base)
            at += len(operands)

    def _stored(
        self, tensors: Sequence[TensorInfo], pieces: Sequence[Span], out: Tensor, place: int, column: int
    ) -> None:
        """The same pieces of tensors of one type, as float32: out [tensors, elements], at row `place` of the chunk."""
        dtype = TORCH_DTYPE[tensors[0].dtype]
        # its own place: copies of the chunk's other rows and columns to a GPU may still be under way
        first = at = (column * (len(self.plan.merge.models) + 1) + place * out.shape[1]) * 8
        for tensor in tensors:
            for span in pieces:
                stop = at + span.numel * dtype.itemsize
                if tensor.made is None:
                    self.files.read_into(tensor, span.start * dtype.itemsize, self._bytes[at:stop])
                else:
                    tensor.made.read(self.files, span.start, self._raw[at:stop].view(dtype))
                at = stop
        stored = self._raw[first:at].view(dtype).view(out.shape)
        out.copy_(stored.to(out.device, non_blocking=True))
        for tensor, row in zip(tensors, out, strict=True) if tensors[0].dtype in FP8 else ():
            at = 0
            for span in pieces:
                self._scales.multiply(tensor, span.start, row[at : at + span.numel])
                at += span.numel

    def _add_deltas(self, name: str, number: int, operand: Operand, pieces: Sequence[Span], row: Tensor) -> None:
        """Fold an operand's deltas into its row, piece by piece."""
        stored = self.plan.base_of(name)[0] if operand.stored is None else operand.stored
        folded = self._chain(name, number, stored, operand.deltas, operand.shared)
        at = 0
        for span in pieces:
            piece = row[at : at + span.numel]
            if operand.folds:
                folded.read(span.start, piece)
            else:
                folded.add_into(span.start, piece)
            at += span.numel

    def _chain(self, name: str, number: int, stored: TensorInfo, deltas: Sequence[Delta], shared: int = 0) -> Chain:
        """A tensor's deltas opened, of the model `number`; those of other tensors are closed."""
        key = (name, number)
        if key not in self._chains:
            self._chains = {k: v for k, v in self._chains.items() if k[0] == name}
            self._chains[key] = chain(self.files, self._scales, stored, deltas, self.plan.device, shared)
        return self._chains[key]


def _kind(operand: Operand) -> tuple[str | None, bool, int]:
    """A key of how a row is read: how the tensor is stored, whether deltas replace its values, and the sign of the
    base."""
    return operand.stored and operand.stored.dtype, operand.folds, operand.base
