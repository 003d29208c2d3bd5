"""Deltas on the tensors of one layout, as deltas on those of another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mergebench.checkpoint.boxes import Box, Laid
from mergebench.checkpoint.delta import Delta, Opened, Source, matrix_shape, tile_rows
from mergebench.checkpoint.header import Reader, TensorInfo
from mergebench.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Deltas = Mapping[str, tuple[Delta, ...]]


@dataclass(frozen=True)
class Moved:
    """A delta on a tensor that is pieces of others, from the deltas on those. A `Delta`."""

    laid: Laid  # where deltas are; the source of a box is the number of a delta, elements outside are unchanged
    deltas: tuple[Delta, ...]
    below: tuple[Laid | None, ...]  # of deltas that need the base: their tensor as pieces of this one
    replacement: TensorInfo | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.laid.shape

    @property
    def kind(self) -> str:
        return self.deltas[0].kind

    @property
    def needs_base(self) -> bool:
        return any(delta.needs_base for delta in self.deltas)

    @property
    def folds(self) -> bool:
        return self.replacement is not None

    @property
    def difference(self) -> TensorInfo | None:
        return None

    @cached_property
    def stored(self) -> tuple[TensorInfo, ...]:
        return tuple(dict.fromkeys(info for delta in self.deltas for info in delta.stored))

    @cached_property
    def digest(self) -> str:
        """16 hex digits: a hash of everything outside the stored bytes."""
        listed = [self.shape, self.laid.boxes, [delta.digest for delta in self.deltas]]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]

    def resident(self) -> int:
        """One of the deltas is open at a time, with the piece of its tensor that is wanted."""
        from mergebench.checkpoint.assembled import Pieces

        piece = max((box.span for box in Pieces(self.laid).boxes), default=0)
        tiles = 3 * tile_rows(self.shape) * matrix_shape(self.shape)[1]
        return max(delta.resident() for delta in self.deltas) + 4 * (2 * piece + tiles)

    def describe(self) -> str:
        return self.deltas[0].describe() + (f", {len(self.deltas)} pieces" if len(self.deltas) > 1 else "")

    def open(self, files: Reader, device: torch.device, base: Source) -> Opened:
        """Open the delta; those that it is made of are opened when they are met."""
        return _Opened(self, files, device, base)


class _Opened:
    """A moved delta, the last piece that was met in memory: an `Opened`."""

    def __init__(self, of: Moved, files: Reader, device: torch.device, base: Source) -> None:
        from mergebench.checkpoint.assembled import Pieces

        self._count, self._columns = matrix_shape(of.shape)
        self.rows = min(tile_rows(of.shape), max(self._count, 1))
        self._of, self._files, self._device, self._base = of, files, device, base
        self._pieces = Pieces(of.laid)
        self._last: tuple[int, Opened] | None = None
        self._span: tuple[Box, Tensor] | None = None

    def tile(self, first: int, base: Tensor | None) -> Tensor:
        """W' - W from row `first` on."""
        import torch  # headers are read without it

        from mergebench.checkpoint.assembled import place

        rows = min(self.rows, self._count - first)
        begin = first * self._columns
        out = torch.full((rows * self._columns,), -0.0, device=self._device)  # adding it changes no bit
        for box, piece in self._pieces.cut(begin, begin + len(out)):
            if box.is_run:
                start, values = piece.start, self._difference(box.source, piece.start, piece.numel)
            else:
                if self._span is None or self._span[0] != box:
                    self._span = None  # its memory is free for the next
                    self._span = box, self._difference(box.source, box.start, box.span)
                start, values = box.start, self._span[1]
            place(piece, begin, out, values, start)
        return out.view(rows, self._columns)

    def fold(self, first: int, base: Tensor) -> Tensor:
        """W' from row `first` on."""
        if self._of.replacement is None:
            return base + self.tile(first, base)
        import torch  # headers are read without it

        from mergebench.checkpoint.files import TORCH_DTYPE

        values = torch.empty(base.numel(), dtype=TORCH_DTYPE[self._of.replacement.dtype])
        self._files.read_elements(self._of.replacement, first * self._columns, values)
        return values.to(self._device).float().view(base.shape)

    def _difference(self, number: int, start: int, numel: int) -> Tensor:
        """Flat elements of one delta's difference."""
        import torch  # headers are read without it

        delta, columns = self._of.deltas[number], matrix_shape(self._of.deltas[number].shape)[1]
        below = self._of.below[number]
        source: Source = self._base if below is None else _Below(self._base, below)
        if self._last is None or self._last[0] != number:
            self._last = None
            self._last = number, delta.open(self._files, self._device, source)
        opened, out = self._last[1], torch.empty(numel, device=self._device)
        row = start // columns // opened.rows * opened.rows
        while row * columns < start + numel:
            base = None
            if delta.needs_base:
                count = min(opened.rows, matrix_shape(delta.shape)[0] - row)
                base = torch.empty(count * columns, device=self._device)
                source.read(row * columns, base)
                base = base.view(-1, columns)
            tile = opened.tile(row, base).reshape(-1)
            at = row * columns
            low, high = max(start, at), min(start + numel, at + len(tile))
            out[low - start : high - start] = tile[low - at : high - at]
            row += opened.rows
        return out


class _Below:
    """A tensor that is pieces of another: a `Source`."""

    def __init__(self, base: Source, laid: Laid) -> None:
        from mergebench.checkpoint.assembled import Pieces

        self._base, self._pieces = base, Pieces(laid)

    def read(self, start: int, out: Tensor) -> None:
        """Fill the flat `out` from element `start`."""
        import torch  # headers are read without it

        from mergebench.checkpoint.assembled import place

        for _, piece in self._pieces.cut(start, start + len(out)):
            values = torch.empty(piece.span, device=out.device)
            self._base.read(piece.start, values)
            place(piece, start, out, values, piece.start)


def move(deltas: Deltas, wanted: Mapping[str, Laid], tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[Delta, ...]]:
    """Deltas on `tensors`, for tensors that are pieces of those.

    `ModelError` if a delta needs the base's values of a tensor that is more than one of them.
    """
    pieces: dict[str, dict[str, list[Box]]] = {}  # by a tensor of `tensors`: of which others it is a part
    for name, laid in wanted.items():
        for box in laid.boxes:
            pieces.setdefault(box.source, {}).setdefault(name, []).append(box)
    moved = {}
    for name, laid in wanted.items():
        sources = list(dict.fromkeys(box.source for box in laid.boxes))
        same = len(sources) == 1 and tensors[sources[0]].shape == laid.shape and laid.boxes[0].with_fewest_axes().is_run
        levels = max(len(deltas.get(source, ())) for source in sources)
        if same and levels:
            moved[name] = deltas[sources[0]]
        elif levels:
            made = (_moved(name, laid, level, deltas, pieces, tensors) for level in range(levels))
            moved[name] = tuple(made)
    return moved


def _moved(
    name: str,
    laid: Laid,
    level: int,
    deltas: Deltas,
    pieces: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, TensorInfo],
) -> Moved:
    """One delta of each tensor that this one is made of."""
    own = {box.source: deltas[box.source][level] for box in laid.boxes if len(deltas.get(box.source, ())) > level}
    numbers = {source: number for number, source in enumerate(own)}
    boxes = tuple(box._replace(source=numbers[box.source]) for box in laid.boxes if box.source in own)
    replaced = {source: delta.replacement for source, delta in own.items() if delta.replacement is not None}
    replacement = None
    if replaced and (len(replaced) < len(own) or (level and len(own) < len({box.source for box in laid.boxes}))):
        raise ModelError(f"{name}: an adapter saves a part of it whole", _APART)
    if replaced:
        from mergebench.checkpoint.assembled import assemble

        infos = {source: info for source, info in replaced.items() if info is not None}
        replacement = assemble(name, laid, {**tensors, **infos})
    below: list[Laid | None] = []
    for source, delta in own.items():
        others = pieces[source]
        if delta.needs_base and replacement is None and set(others) != {name}:
            raise ModelError(f"{name}: {delta.describe()} changes '{source}', which has parts in other tensors", _APART)
        if not delta.needs_base or replacement is not None:
            below.append(None)
            continue
        turned = [Box(b.counts, b.start, b.strides, name, b.at, b.steps) for b in others[name]]
        below.append(Laid(delta.shape, tuple(turned)))
    return Moved(Laid(laid.shape, boxes), tuple(own.values()), tuple(below), replacement)


_APART = "save the base as transformers has it in memory, with save_pretrained(DIR, save_original_format=False)"
