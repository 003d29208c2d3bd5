"""Tensors without data that know which elements of which others they are made of.

transformers' own code loads, renames, splits, stacks and transposes them like any others, so that a model's layout is
what that code makes of it, and no rule of it stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.boxes import Laid, joined, whole


class Traced(Tensor):
    """A tensor of float32 that has boxes in place of data."""

    laid: Laid

    @staticmethod
    def __new__(cls, laid: Laid, requires_grad: bool = False) -> Traced:
        made: Traced = torch.Tensor._make_wrapper_subclass(cls, laid.shape, requires_grad=requires_grad)
        made.laid = laid
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        change = _OPERATIONS.get(func.overloadpacket)
        if change is None:
            raise NotImplementedError(f"{func}: not a change of layout")
        laid = change(*(_laid(arg) for arg in args), **(kwargs or {}))
        return [Traced(one) for one in laid] if isinstance(laid, list) else Traced(laid)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Traced{list(self.shape)}"


def _laid(arg: Any) -> Any:
    if isinstance(arg, list | tuple):
        return [_laid(one) for one in arg]
    return arg.laid if isinstance(arg, Traced) else arg


def traced(source: Any, shape: Sequence[int]) -> Traced:
    """All of a tensor of this shape."""
    return Traced(Laid(tuple(shape), tuple(whole(source, shape))))


def _same(laid: Laid, *_: Any, **__: Any) -> Laid:
    return laid


def _view(laid: Laid, shape: Sequence[int]) -> Laid:
    known = 1
    for size in shape:
        known *= size if size >= 0 else 1
    numel = 1
    for size in laid.shape:
        numel *= size
    return laid.reshaped([numel // known if size < 0 else size for size in shape])


def _transpose(laid: Laid, first: int, second: int) -> Laid:
    dims = list(range(len(laid.shape)))
    dims[first], dims[second] = dims[second], dims[first]
    return laid.permuted(dims)


def _unsqueeze(laid: Laid, dim: int) -> Laid:
    dim %= len(laid.shape) + 1
    return laid.reshaped([*laid.shape[:dim], 1, *laid.shape[dim:]])


def _squeeze(laid: Laid, dim: int) -> Laid:
    dim %= len(laid.shape)
    return laid.reshaped([*laid.shape[:dim], *laid.shape[dim + 1 :]]) if laid.shape[dim] == 1 else laid


def _select(laid: Laid, dim: int, index: int) -> Laid:
    index %= laid.shape[dim]
    return _squeeze(laid.cut(dim, index, index + 1), dim)


def _slice(laid: Laid, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Laid:
    kept = range(laid.shape[dim])[start:end:step]
    return laid.cut(dim, kept.start, kept.stop, step)


def _split(laid: Laid, sizes: int | Sequence[int], dim: int = 0) -> list[Laid]:
    size = laid.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, size - first) for first in range(0, size, sizes)]
    found, first = [], 0
    for count in sizes:
        found.append(laid.cut(dim, first, first + count))
        first += count
    return found


def _stack(parts: Sequence[Laid], dim: int = 0) -> Laid:
    return joined([_unsqueeze(part, dim) for part in parts], dim)


def _cat(parts: Sequence[Laid], dim: int = 0) -> Laid:
    return joined(parts, dim)


def _unbind(laid: Laid, dim: int = 0) -> list[Laid]:
    return [_select(laid, dim, index) for index in range(laid.shape[dim])]


_aten = torch.ops.aten
_OPERATIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((_aten.detach, _aten.alias, _aten.clone, _aten._to_copy, _aten.contiguous), _same),
    **dict.fromkeys((_aten.view, _aten._unsafe_view, _aten.reshape), _view),
    _aten.transpose: _transpose,
    _aten.permute: Laid.permuted,
    _aten.unsqueeze: _unsqueeze,
    _aten.squeeze: _squeeze,
    _aten.select: _select,
    _aten.slice: _slice,
    _aten.split: _split,
    _aten.split_with_sizes: _split,
    _aten.stack: _stack,
    _aten.cat: _cat,
    _aten.unbind: _unbind,
}
