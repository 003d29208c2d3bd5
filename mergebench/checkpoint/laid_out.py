"""Parts of stored tensors as tensors of their own, and stored tensors in another layout."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from mergebench.checkpoint.files import whole
from mergebench.checkpoint.header import ITEM_SIZE, Reader, TensorInfo


@dataclass(frozen=True)
class _Computed:
    """A small tensor computed from a stored one whenever it is read: a `Made`."""

    own: TensorInfo

    def settle(self, files: Reader) -> None:
        """Nothing is shared by workers."""

    def digest(self) -> str:
        """A hash of what it is made of."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def resident(self) -> int:
        """The tensor it is computed from, and itself: both are small."""
        return 2 * self.own.nbytes

    def values(self, files: Reader) -> Tensor:
        """The whole tensor."""
        raise NotImplementedError

    def read(self, files: Reader, start: int, out: Tensor) -> None:
        """Fill the flat `out` from element `start`."""
        out.copy_(self.values(files).reshape(-1)[start : start + len(out)])


@dataclass(frozen=True)
class Columns(_Computed):
    """Every `step`-th column of a stored matrix, from column `first` to `stop`."""

    first: int
    stop: int
    step: int

    def values(self, files: Reader) -> Tensor:
        """[rows, columns / step]."""
        return whole(files, self.own)[:, self.first : self.stop : self.step]


@dataclass(frozen=True)
class Diagonal(_Computed):
    """Equal blocks of rows of a stored matrix, placed on the diagonal of a matrix of zeros."""

    blocks: int

    def values(self, files: Reader) -> Tensor:
        """[rows, blocks * columns]."""
        found: Tensor = torch.block_diag(*whole(files, self.own).chunk(self.blocks))  # type: ignore[no-untyped-call]
        return found


def columns(info: TensorInfo, first: int, stop: int, step: int = 1) -> TensorInfo:
    """Every `step`-th column of a matrix, from `first` to `stop`."""
    shape = info.shape[0], len(range(first, stop, step))
    return _made(info, f"{info.name}[:, {first}:{stop}:{step}]", shape, Columns(info, first, stop, step))


def diagonal(info: TensorInfo, blocks: int) -> TensorInfo:
    """A block-diagonal matrix of equal blocks of rows."""
    shape = info.shape[0], info.shape[1] * blocks
    return _made(info, f"{info.name} on {blocks} blocks", shape, Diagonal(info, blocks))


def rows(info: TensorInfo, first: int, count: int) -> TensorInfo:
    """Rows of a stored matrix."""
    size = ITEM_SIZE[info.dtype] * info.shape[1]
    return info._replace(
        name=f"{info.name}[{first}:{first + count}]",
        shape=(count, info.shape[1]),
        offset=info.offset + first * size,
        nbytes=count * size,
    )


def _made(info: TensorInfo, name: str, shape: tuple[int, ...], made: _Computed) -> TensorInfo:
    found = info._replace(name=name, shape=shape, made=made)
    return found._replace(nbytes=found.numel * ITEM_SIZE[info.dtype])
