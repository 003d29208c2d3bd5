"""Where the elements of a tensor lie in other tensors: boxes, each a strided run of one tensor on a run of another.

Both tensors are taken flat. A box says that for all 0 <= i_k < counts[k]

    element  at + sum i_k steps[k]  of the tensor  is element  start + sum i_k strides[k]  of `source`.

Slices, rows, stacks, transposes and permutations of tensors are such boxes, and so is whatever is composed of them.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

Shape = Sequence[int]


class Box(NamedTuple):
    """A run of a tensor and the run of another that it equals. Axes of one element are left out."""

    counts: tuple[int, ...]
    at: int
    steps: tuple[int, ...]
    source: Any
    start: int
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.counts)

    @property
    def last(self) -> int:
        """The tensor's last element that it covers."""
        return self.at + sum((count - 1) * step for count, step in zip(self.counts, self.steps, strict=True))

    @property
    def span(self) -> int:
        """Elements of the source from the first to the last that it reads."""
        return 1 + sum((count - 1) * step for count, step in zip(self.counts, self.strides, strict=True))

    @property
    def is_run(self) -> bool:
        """Whether it is one piece of both tensors."""
        return self.steps == self.strides and self.steps in ((), (1,))

    def part(self, axis: int, first: int, stop: int) -> Box:
        """Elements `first` to `stop` of one axis."""
        at, start = self.at + first * self.steps[axis], self.start + first * self.strides[axis]
        axes = [*zip(self.counts, self.steps, self.strides, strict=True)]
        axes[axis] = stop - first, *axes[axis][1:]
        return self._replace(at=at, start=start).with_axes(axes)

    def with_axes(self, axes: Iterable[tuple[int, int, int]]) -> Box:
        """A box from the same elements on, of these (count, step, stride)."""
        kept = [axis for axis in axes if axis[0] != 1]
        counts, steps, strides = zip(*kept, strict=True) if kept else ((), (), ())
        return self._replace(counts=counts, steps=steps, strides=strides)

    def with_fewest_axes(self) -> Box:
        """The same box, the longest step first, with axes joined that run on in both tensors."""
        axes = zip(self.counts, self.steps, self.strides, strict=True)
        joined: list[tuple[int, int, int]] = []
        for count, step, stride in sorted(axes, key=lambda axis: axis[1]):
            if joined and (step, stride) == (joined[-1][0] * joined[-1][1], joined[-1][0] * joined[-1][2]):
                joined[-1] = joined[-1][0] * count, *joined[-1][1:]
            else:
                joined.append((count, step, stride))
        return self.with_axes(joined[::-1])


def strides_of(shape: Shape) -> tuple[int, ...]:
    """Elements between neighbours along each dimension."""
    return tuple(accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1] if shape else ()


def whole(source: Any, shape: Shape) -> list[Box]:
    """A tensor that is all of another."""
    if 0 in shape:
        return []
    sides = strides_of(shape)
    return [Box((), 0, (), source, 0, ()).with_axes(zip(shape, sides, sides, strict=True))]


class _Axis(NamedTuple):
    """Along one dimension: elements first, first + step, ... and the stride in the source."""

    first: int
    step: int
    length: int
    stride: int


class _Fitted(NamedTuple):
    """A box in the coordinates of a shape, one axis for each dimension."""

    axes: tuple[_Axis, ...]
    source: Any
    start: int

    def box(self, shape: Shape) -> Box:
        """The box in a tensor of another shape with as many dimensions."""
        sides = strides_of(shape)
        at = sum(axis.first * side for axis, side in zip(self.axes, sides, strict=True))
        axes = [(axis.length, axis.step * side, axis.stride) for axis, side in zip(self.axes, sides, strict=True)]
        return Box((), at, (), self.source, self.start, ()).with_axes(axes)


def _fitted(box: Box, shape: Shape) -> Iterator[_Fitted]:
    """A box, cut so that each axis runs along one dimension of the shape, and at most one along each."""
    sides = strides_of(shape)
    at = [box.at // side % size for side, size in zip(sides, shape, strict=True)]
    axes = [_Axis(first, 1, 1, 0) for first in at]
    for number in sorted(range(len(box.counts)), key=lambda number: -box.counts[number]):
        count, step, stride = box.counts[number], box.steps[number], box.strides[number]
        dim = next(d for d, side in enumerate(sides) if side <= step and shape[d] > 1)
        cuts: Sequence[int] = range(count + 1)  # one by one
        if step % sides[dim] == 0 and axes[dim].length == 1:
            along = step // sides[dim]
            room = (shape[dim] - 1 - at[dim]) // along + 1  # elements until the end of the dimension
            if room >= count:
                axes[dim] = _Axis(at[dim], along, count, stride)
                continue
            wrap = shape[dim] // along
            if shape[dim] % along == 0 and at[dim] < along and count % wrap == 0:  # it runs on in the dimension above
                split = [*zip(box.counts, box.steps, box.strides, strict=True)]
                split[number : number + 1] = [(count // wrap, step * wrap, stride * wrap), (wrap, step, stride)]
                yield from _fitted(box.with_axes(split), shape)
                return
            cuts = (0, room, count)
        for first, stop in pairwise(cuts):
            yield from _fitted(box.part(number, first, stop), shape)
        return
    yield _Fitted(tuple(axes), box.source, box.start)


class Laid(NamedTuple):
    """A tensor as boxes of others."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @property
    def is_complete(self) -> bool:
        """Whether the boxes cover every element; they never overlap."""
        return sum(box.numel for box in self.boxes) == math.prod(self.shape)

    def _each(self, shape: Shape, change: Callable[[_Fitted], _Fitted | None]) -> Laid:
        """A tensor of another shape, of the boxes as `change` gives them."""
        found = [change(one) for box in self.boxes for one in _fitted(box, self.shape)]
        return Laid(tuple(shape), tuple(one.box(shape) for one in found if one is not None))

    def reshaped(self, shape: Shape) -> Laid:
        return Laid(tuple(shape), self.boxes)

    def permuted(self, dims: Sequence[int]) -> Laid:
        """Dimension `dims[k]` becomes dimension k."""
        order = [dim % len(self.shape) for dim in dims]
        return self._each(
            [self.shape[dim] for dim in order],
            lambda one: one._replace(axes=tuple(one.axes[dim] for dim in order)),
        )

    def cut(self, dim: int, first: int, stop: int, step: int = 1) -> Laid:
        """Elements `first` to `stop` of a dimension."""
        dim %= len(self.shape)
        size = len(range(first, stop, step))
        shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])

        def change(one: _Fitted) -> _Fitted | None:
            both = _shared(one.axes[dim], _Axis(first, step if size > 1 else 1, size, 0))
            if both is None:
                return None
            axis = both.axis._replace(first=(both.axis.first - first) // step, step=max(both.axis.step // step, 1))
            return one._replace(axes=(*one.axes[:dim], axis, *one.axes[dim + 1 :]), start=one.start + both.ahead[0])

        return self._each(shape, change)


def joined(parts: Sequence[Laid], dim: int) -> Laid:
    """Tensors one after the other along a dimension."""
    dim %= len(parts[0].shape)
    sizes = [part.shape[dim] for part in parts]
    shape = (*parts[0].shape[:dim], sum(sizes), *parts[0].shape[dim + 1 :])
    boxes: list[Box] = []
    for part, before in zip(parts, accumulate(sizes, initial=0), strict=False):
        if math.prod(shape[:dim]) == 1:
            shift = before * math.prod(shape[dim + 1 :])
            boxes += (box._replace(at=box.at + shift) for box in part.boxes)
            continue
        for box in part.boxes:
            for one in _fitted(box, part.shape):
                axis = one.axes[dim]._replace(first=one.axes[dim].first + before)
                boxes.append(one._replace(axes=(*one.axes[:dim], axis, *one.axes[dim + 1 :])).box(shape))
    return Laid(shape, tuple(boxes))


def through(one: Laid, other: Laid) -> Iterator[tuple[Any, Box]]:
    """Two accounts of the same tensor: the sources of `other` as boxes of those of `one`."""
    mine = sorted(((piece.box(one.shape), piece) for box in one.boxes for piece in _fitted(box, one.shape)), key=_place)
    starts = [box.at for box, _ in mine]
    ends = [*accumulate((box.last for box, _ in mine), max)]
    for whole in other.boxes:
        for theirs in _fitted(whole, other.shape):
            box = theirs.box(other.shape)
            for _, my in mine[bisect_left(ends, box.at) : bisect_right(starts, box.last)]:
                shared = [_shared(a, b) for a, b in zip(my.axes, theirs.axes, strict=True)]
                pieces = [piece for piece in shared if piece is not None]
                if len(pieces) == len(shared):
                    start = my.start + sum(piece.ahead[0] for piece in pieces)
                    at = theirs.start + sum(piece.ahead[1] for piece in pieces)
                    axes = [(piece.axis.length, piece.stride, piece.axis.stride) for piece in pieces]
                    yield theirs.source, Box((), at, (), my.source, start, ()).with_axes(axes)


def _place(pair: tuple[Box, _Fitted]) -> int:
    return pair[0].at


class _Shared(NamedTuple):
    axis: _Axis  # with the first's stride
    ahead: tuple[int, int]  # elements from where either starts in its source
    stride: int  # in the second's source


def _shared(one: _Axis, other: _Axis) -> _Shared | None:
    """The elements that two axes of a dimension share."""
    step = math.lcm(one.step, other.step)
    low = max(one.first, other.first)
    stop = min(axis.first + (axis.length - 1) * axis.step for axis in (one, other)) + 1
    both = (
        n for n in range(low, min(low + step, stop)) if not (n - one.first) % one.step + (n - other.first) % other.step
    )
    first = next(both, None)
    if first is None:
        return None
    count = (stop - 1 - first) // step + 1
    ahead = (first - one.first) // one.step * one.stride, (first - other.first) // other.step * other.stride
    mine, theirs = (step // axis.step * axis.stride for axis in (one, other))
    return _Shared(_Axis(first, step if count > 1 else 1, count, mine), ahead, theirs)


def cut_flat(boxes: Iterable[Box], first: int, stop: int) -> Iterator[Box]:
    """The parts of boxes that cover elements `first` to `stop` of the flat tensor."""
    for box in boxes:
        if box.at >= stop or box.last < first:
            continue
        if first <= box.at and box.last < stop:
            yield box
            continue
        axis = max(range(len(box.counts)), key=lambda k: box.steps[k])
        step, inner = box.steps[axis], box.last - (box.counts[axis] - 1) * box.steps[axis]  # the last of its first
        touched = range(max(-((inner - first) // step), 0), min((stop - 1 - box.at) // step + 1, box.counts[axis]))
        inside = range(max(-((box.at - first) // step), 0), min((stop - 1 - inner) // step + 1, box.counts[axis]))
        if inside:
            yield box.part(axis, inside.start, inside.stop)
        for number in touched:
            if number not in inside:
                yield from cut_flat([box.part(axis, number, number + 1)], first, stop)
