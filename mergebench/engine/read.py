"""Fill a chunk: stored values with their deltas, minus the base, as float32 on the device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import cast

import numpy as np
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
PROBE = 1 << 9  # elements compared before the whole chunk: nearly all chunks with a change have one here


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
        self._changed = ""  # the tensor of the last chunk with a change: its other chunks are not compared

    def load(self, spans: Sequence[Span], apply: bool, alike: bool = False) -> tuple[Tensor, Tensor]:
        """(values [models, elements], base [elements]); the base is only filled if it is needed.

        alike: the spans are of one tensor, or of tensors that may share a chunk (`Plan.way`).
        """
        numel = sum(span.numel for span in spans)
        values = self._values[: len(self.plan.merge.models) * numel].view(-1, numel)
        base = self._base[:numel]
        if alike:
            self._fill(spans, values, base, 0, apply)
            return values, base
        at = 0
        for _, group in groupby(spans, key=lambda span: span.tensor):
            pieces = list(group)
            stop = at + sum(span.numel for span in pieces)
            self._fill(pieces, values[:, at:stop], base[at:stop], at, apply)
            at = stop
        return values, base

    def unchanged(self, spans: Sequence[Span]) -> Tensor | None:
        """The chunk as the base stores it, until the next chunk is read, if all models store the same bytes; None if a
        model changed something, or if there is a -0, which may become +0 when zero is added. For `Plan.keeps`."""
        if spans[0].tensor == self._changed:
            return None
        infos = self.plan.merge.reference.tensors
        dtype = TORCH_DTYPE[infos[spans[0].tensor].dtype]
        raw = self._raw.numpy().view(f"i{dtype.itemsize}")
        for pieces in ([spans[0]._replace(stop=min(spans[0].start + PROBE, spans[0].stop))], spans):
            end = self._read([infos[one.tensor] for one in pieces], pieces, 0, dtype)
            base, model = raw[: end // dtype.itemsize], raw[end // dtype.itemsize : 2 * end // dtype.itemsize]
            for operands in zip(*(self.plan.operands[one.tensor] for one in pieces), strict=True):
                tensors = [one.stored for one in operands if one.stored is not None]
                if tensors:
                    self._read(tensors, pieces, end, dtype)
                    if not np.array_equal(base, model):
                        self._changed = spans[0].tensor
                        return None
        return None if (base == np.iinfo(base.dtype).min).any() else self._raw[:end].view(dtype)

    def _fill(self, pieces: Sequence[Span], values: Tensor, base: Tensor, column: int, apply: bool) -> None:
        """Pieces of tensors that are alike, `column` of the chunk onwards. Models stored in the same way share the
        calls: on a chunk in the cache, a call costs as much as its arithmetic."""
        name = pieces[0].tensor
        if self.plan.needs_base(name, apply):
            stored, deltas = self.plan.base_of(name)
            if deltas:
                at = 0
                for span in pieces:
                    self._chain(name, BASE, stored, deltas).read(span.start, base[at : at + span.numel])
                    at += span.numel
            else:
                infos = self.plan.merge.reference.tensors
                own = [infos[one.tensor] if one.tensor != name else stored for one in pieces]
                self._stored([own], pieces, base[None], len(values), column)
        operands = [self.plan.operands[span.tensor] for span in pieces]
        at = 0
        for (dtype, folds, sign), group in groupby(operands[0], key=_kind):
            count = len(list(group))
            rows = values[at : at + count]
            if dtype is None:
                rows.zero_()
            elif not folds:
                tensors = [[cast(TensorInfo, one[row].stored) for one in operands] for row in range(at, at + count)]
                self._stored(tensors, pieces, rows, at, column)
            for number, operand in enumerate(operands[0][at : at + count], at):
                if operand.added:
                    self._add_deltas(name, number, operand, pieces, values[number])
            if sign:
                rows.add_(base) if sign > 0 else rows.sub_(base)
            at += count

    def _stored(
        self, tensors: Sequence[Sequence[TensorInfo]], pieces: Sequence[Span], out: Tensor, place: int, column: int
    ) -> None:
        """The same pieces of tensors of one type, as float32: out [rows, elements], at row `place` of the chunk.

        tensors: for each row, the tensor of each piece. Pieces that lie one after another are read in one go.
        """
        dtype = TORCH_DTYPE[tensors[0][0].dtype]
        # its own place: copies of the chunk's other rows and columns to a GPU may still be under way
        first = at = (column * (len(self.plan.merge.models) + 1) + place * out.shape[1]) * 8
        for row in tensors:
            at = self._read(row, pieces, at, dtype)
        stored = self._raw[first:at].view(dtype).view(out.shape)
        out.copy_(stored.to(out.device, non_blocking=True))
        for tensor_row, numbers in zip(tensors, out, strict=True) if tensors[0][0].dtype in FP8 else ():
            at = 0
            for tensor, span in zip(tensor_row, pieces, strict=True):
                self._scales.multiply(tensor, span.start, numbers[at : at + span.numel])
                at += span.numel

    def _read(self, tensors: Sequence[TensorInfo], pieces: Sequence[Span], at: int, dtype: torch.dtype) -> int:
        """Read pieces, each of its tensor, into the raw bytes from `at` on; returns where they end."""
        item, start = dtype.itemsize, at
        first, end = tensors[0], -1  # bytes `start` to `at` are still to be read: those before `end` in first's file
        for tensor, span in zip(tensors, pieces, strict=True):
            size, offset = span.numel * item, tensor.offset + span.start * item
            if tensor.made is not None:
                tensor.made.read(self.files, span.start, self._raw[at : at + size].view(dtype))
                start = at + size
            elif offset != end or tensor.file is not first.file:
                self.files.read_into(first, end - (at - start) - first.offset, self._bytes[start:at])
                start, first, end = at, tensor, offset
            at, end = at + size, end + size
        if start < at:
            self.files.read_into(first, end - (at - start) - first.offset, self._bytes[start:at])
        return at

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
