"""A tensor assembled of pieces of stored ones, and its values as they are read: slices, rows, stacks, transposes."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from mergebench.checkpoint.boxes import Box, Laid, cut_flat
from mergebench.checkpoint.files import TORCH_DTYPE, whole
from mergebench.checkpoint.fp8 import Scaler
from mergebench.checkpoint.header import ITEM_SIZE, Reader, TensorInfo
from mergebench.checkpoint.held import Held
from mergebench.checkpoint.stack import stack
from mergebench.errors import ModelError

_held = Held()  # transposed pieces


class Pieces:
    """Boxes in the order of the elements they cover, each small enough that its source's span can be held."""

    def __init__(self, laid: Laid) -> None:
        boxes = [piece for box in laid.boxes for piece in _blocks(box.with_fewest_axes())]
        self.boxes = sorted(boxes, key=lambda box: box.at)
        self._starts = [box.at for box in self.boxes]
        self._ends = [*accumulate((box.last for box in self.boxes), max)]

    def cut(self, first: int, stop: int) -> Iterator[tuple[Box, Box]]:
        """The boxes that cover elements `first` to `stop`, and the parts of them that do."""
        for box in self.boxes[bisect_left(self._ends, first) : bisect_right(self._starts, stop - 1)]:
            for piece in cut_flat([box], first, stop):
                yield box, piece


def _blocks(box: Box) -> Iterator[Box]:
    """A box cut along its outermost axis, until it is runs or strided in itself."""
    if not box.is_run and len(box.counts) > 1 and box.strides[0] == max(box.strides):
        inner = box.part(0, 0, 1)
        if not inner.is_run and inner.span <= box.strides[0]:
            for number in range(box.counts[0]):
                yield from _blocks(box.part(0, number, number + 1))
            return
    yield box


def place(piece: Box, first: int, out: Tensor, source: Tensor, start: int) -> None:
    """Copy a piece from `source`, the flat elements from `start` on, to `out`, those from `first` on."""
    target = out.as_strided(piece.counts, piece.steps, out.storage_offset() + piece.at - first)
    target.copy_(source.as_strided(piece.counts, piece.strides, source.storage_offset() + piece.start - start))


@dataclass(frozen=True, eq=False)
class Assembled:
    """Pieces of stored tensors: a `Made`."""

    name: str
    laid: Laid  # of the stored tensors

    @property
    def own(self) -> TensorInfo:
        own: TensorInfo = self.laid.boxes[0].source
        return own

    @cached_property
    def dtype(self) -> str:
        """The type of the stored tensors if they share one and have no scales, else float32."""
        parts = [box.source for box in self.laid.boxes]
        types = {part.dtype for part in parts}
        return types.pop() if len(types) == 1 and not any(part.scale for part in parts) else "F32"

    def digest(self) -> str:
        """A hash of the pieces and where they lie."""
        listed = [(*box._replace(source=None), box.source.place) for box in self.laid.boxes]
        return hashlib.sha256(repr(listed).encode()).hexdigest()

    def settle(self, files: Reader) -> None:
        """Compute which pieces there are, and what the stored tensors need."""
        _ = self._pieces
        for box in self.laid.boxes:
            if box.source.made is not None:
                box.source.made.settle(files)

    def resident(self) -> int:
        """Bytes of the longest piece that is kept because it is needed for many chunks."""
        kept = [box.span for box in self._pieces.boxes if not box.is_run]
        return max(kept, default=0) * ITEM_SIZE[self.dtype]

    @cached_property
    def _pieces(self) -> Pieces:
        return Pieces(self.laid)

    def read(self, files: Reader, start: int, out: Tensor) -> None:
        """Fill the flat `out` (of this tensor's type) with elements `start` onwards."""
        for box, piece in self._pieces.cut(start, start + len(out)):
            if box.is_run:
                self._stored(files, box.source, piece.start, out[piece.at - start :][: piece.numel])
            else:
                place(piece, start, out, self._span(files, box), box.start)

    def _span(self, files: Reader, box: Box) -> Tensor:
        """All elements of the source from a box's first to its last."""

        def make() -> Tensor:
            span = torch.empty(box.span, dtype=TORCH_DTYPE[self.dtype])
            self._stored(files, box.source, box.start, span)
            return span

        return _held.get(self.name, id(self), (box.source.place, box.source.stamp, box.start, box.span), make)

    def _stored(self, files: Reader, info: TensorInfo, start: int, out: Tensor) -> None:
        """Fill the flat `out` with a stored tensor's elements from `start`, times their scales."""
        if info.dtype == self.dtype:
            files.read_elements(info, start, out)
            return
        stored = torch.empty(len(out), dtype=TORCH_DTYPE[info.dtype])
        files.read_elements(info, start, stored)
        out.copy_(stored)
        if info.scale is not None:
            Scaler(info, whole(files, info.scale.stored)).multiply(start, out)


def assemble(name: str, laid: Laid, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    """One tensor of pieces of others, by their names, in the form that is read fastest.

    `ModelError` if floats are joined with other types.
    """
    boxes = sorted((box.with_fewest_axes() for box in laid.boxes), key=lambda box: box.at)
    sources = [tensors[box.source] for box in boxes]
    if len({info.is_float for info in sources}) > 1:
        raise ModelError(f"{name}: {sources[0].name} and {sources[1].name} are joined, of other types")
    if all(box.is_run and _can_cut(box, info) for box, info in zip(boxes, sources, strict=True)):
        parts = [_range(box, info) for box, info in zip(boxes, sources, strict=True)]
        if len(parts) > 1:
            return stack(name, parts, laid.shape)
        return parts[0]._replace(name=name, shape=laid.shape)
    placed = tuple(box._replace(source=info) for box, info in zip(boxes, sources, strict=True))
    made = Assembled(name, Laid(laid.shape, placed))
    info = sources[0]._replace(name=name, dtype=made.dtype, shape=laid.shape, scale=None, made=made)
    return info._replace(nbytes=info.numel * ITEM_SIZE[made.dtype])


def _can_cut(box: Box, info: TensorInfo) -> bool:
    """Whether a run of a tensor can be named as a tensor itself: all of it, or plain bytes of a file."""
    return box.numel == info.numel or (info.made is None and info.scale is None)


def _range(box: Box, info: TensorInfo) -> TensorInfo:
    """A run of a stored tensor."""
    if box.numel == info.numel:
        return info
    item = ITEM_SIZE[info.dtype]
    name = f"{info.name}[{box.start}:{box.start + box.numel}]"
    return info._replace(name=name, shape=(box.numel,), offset=info.offset + box.start * item, nbytes=box.numel * item)
