"""Write a checkpoint: shards filled in any order, index, config and side files, all by umask.

safetensors has no streaming writer (it wants every tensor of a shard in memory, and makes files of mode 0600), so the
header is written first and chunks are put in place with `pwrite`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergebench.checkpoint.distributed import SHARD
from mergebench.checkpoint.files import DTYPE_NAME, put, write_atomically, write_error
from mergebench.checkpoint.header import ITEM_SIZE, TensorInfo
from mergebench.checkpoint.naming import USUAL, Naming, index_of
from mergebench.errors import RunError

ALIGN = 64  # the data of a shard start at a multiple of this many bytes


class OutTensor(NamedTuple):
    """One tensor of the output: name, stored dtype, shape; `parts` if the file has several in its place."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    parts: tuple[OutTensor, ...] = ()

    @property
    def stored(self) -> tuple[OutTensor, ...]:
        """The tensors of the file."""
        return self.parts or (self,)


@dataclass(frozen=True)
class Shard:
    """One file of the output and its tensors, in order."""

    file: str  # may lie in a folder
    tensors: tuple[OutTensor, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[Shard, ...] = ()  # files that are filled with it

    @property
    def files(self) -> tuple[Shard, ...]:
        """This file, and those beside it."""
        return (self, *self.beside)

    @property
    def inside(self) -> list[OutTensor]:
        """The tensors under their names in the file: those of a module in a folder are without its name."""
        folder = self.file.rpartition("/")[0]
        if not folder:
            return self.stored
        return [tensor._replace(name=tensor.name.removeprefix(f"{folder}/")) for tensor in self.stored]

    @cached_property
    def stored(self) -> list[OutTensor]:
        """The tensors of the file, in order: where bytes stand among larger elements, those first, so that all are
        aligned."""
        listed = [part for tensor in self.tensors for part in tensor.stored]
        if any(tensor.parts for tensor in self.tensors):
            listed.sort(key=lambda tensor: -ITEM_SIZE[tensor.dtype])
        return listed

    @cached_property
    def header(self) -> bytes:
        """The file's first bytes: length and JSON, padded to `ALIGN`."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt", **self.metadata}}
        end = 0
        for tensor in self.inside:
            start, end = end, end + tensor.nbytes
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
        raw = json.dumps(entries, separators=(",", ":")).encode()
        raw += b" " * (-(8 + len(raw)) % ALIGN)
        return struct.pack("<Q", len(raw)) + raw

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored)


def lay_out(
    tensors: Iterable[TensorInfo],
    dtypes: Mapping[str, str],
    shard_size: int,
    by_file: bool = True,
    naming: Naming = USUAL,
    parts: Mapping[str, tuple[OutTensor, ...]] = MappingProxyType({}),
) -> list[Shard]:
    """The output's shards: the base's layout (`by_file`), cut where a shard would exceed `shard_size` bytes; last those
    in folders, a file for each module of sentence-transformers. parts: what files have in the place of some tensors."""
    groups: dict[str | None, list[list[OutTensor]]] = {}
    file, room = None, 0
    for info in tensors:
        by_file = by_file and info.file.suffix != SHARD  # a rank's file has parts of many tensors
        dtype = dtypes[info.name]
        out = OutTensor(info.name, dtype, info.shape, info.numel * ITEM_SIZE[dtype], parts.get(info.name, ()))
        size = sum(part.nbytes for part in out.stored)
        folder = naming.folder_of(info.name)
        own = groups.setdefault(folder, [])
        whole = folder is not None and not naming.pipeline
        new_file = info.file is not file and (by_file or file is None)
        if not own or (not whole and (new_file or (size > room and own[-1]))):
            own.append([])
            file, room = info.file, shard_size
        own[-1].append(out)
        room -= size
    ordered = sorted(groups or {None: [[]]}, key=lambda folder: folder is not None)
    found = []
    for folder in ordered:
        own = groups.get(folder, [[]])
        found += [Shard(name, tuple(one)) for name, one in zip(naming.files(len(own), folder), own, strict=True)]
    return found


def create(path: Path, shard: Shard) -> None:
    """Make a shard's file: its header, and room for its tensors, all zero."""
    header = shard.header
    size = len(header) + shard.nbytes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, size)  # a full disk fails here, not after an hour
            else:
                os.truncate(file, size)
            put(file, memoryview(header), 0)
        finally:
            os.close(file)
    except OSError as error:
        raise write_error(path, error) from None


def is_as_planned(path: Path, shard: Shard) -> bool:
    """Whether a file has a shard's header, and its length."""
    try:
        with path.open("rb") as file:
            same = file.read(len(shard.header)) == shard.header
            return same and os.fstat(file.fileno()).st_size == len(shard.header) + shard.nbytes
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None


class ShardFiles:
    """The shards of a directory, created before; `write` puts elements in place, in any order.

    One file is open at a time: a large model has more shards than a process may have files.
    """

    def __init__(self, directory: Path, shards: Iterable[Shard]) -> None:
        self._place: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, int] = {}
        for shard in shards:
            path, at = directory / shard.file, len(shard.header)
            for tensor in shard.stored:
                self._place[tensor.name] = (path, at)
                at += tensor.nbytes

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Put the flat `values` (already of the stored dtype) at element `start` of a tensor."""
        path, at = self._place[name]
        self._put(path, at + start * values.element_size(), values)

    def write_rows(self, name: str, start: int, stride: int, rows: Tensor) -> None:
        """Put rows of bytes [rows, bytes] into a tensor, the first at byte `start`, each `stride` after the one before
        it."""
        path, at = self._place[name]
        if len(rows) == 1 or stride == rows.shape[1]:
            self._put(path, at + start, rows.reshape(-1))
            return
        raw, width = rows.contiguous().view(-1).numpy().data, rows.shape[1]
        try:
            file = self._file(path)
            for first, place in zip(range(0, len(raw), width), count(at + start, stride), strict=False):
                if (done := os.pwrite(file, raw[first : first + width], place)) < width:
                    put(file, raw[first + done : first + width], place + done)
        except OSError as error:
            raise write_error(path, error) from None

    def write_all(self, tensors: Sequence[tuple[str, int]], values: Tensor) -> None:
        """Put the flat `values` into whole tensors, given with their sizes, one after another; neighbours at once."""
        item, first, stop = values.element_size(), 0, 0
        begin = end = self._place[tensors[0][0]]
        for name, numel in tensors:
            place = self._place[name]
            if place != end:
                self._put(*begin, values[first:stop])
                begin, first = place, stop
            stop, end = stop + numel, (place[0], place[1] + numel * item)
        self._put(*begin, values[first:stop])

    def _put(self, path: Path, at: int, values: Tensor) -> None:
        try:
            put(self._file(path), values.view(torch.uint8).numpy().data, at)
        except OSError as error:
            raise write_error(path, error) from None

    def _file(self, path: Path) -> int:
        """A file's descriptor; another file is closed."""
        if path not in self._open:
            self.close()
            self._open[path] = os.open(path, os.O_WRONLY)
        return self._open[path]

    def close(self) -> None:
        for file in self._open.values():
            os.close(file)
        self._open.clear()


def described(name: str, values: Tensor) -> OutTensor:
    """How a tensor is written."""
    return OutTensor(name, DTYPE_NAME[values.dtype], tuple(values.shape), values.nbytes)


def write_shard(directory: Path, shard: Shard, values: Callable[[str], Tensor]) -> None:
    """Make a shard's file and write its tensors in order, each asked for when it is written."""
    create(directory / shard.file, shard)
    with closing(ShardFiles(directory, [shard])) as written:
        for tensor in shard.stored:
            written.write(tensor.name, 0, values(tensor.name).contiguous().reshape(-1))


def as_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A whole safetensors file of small tensors: equal bytes for equal content (the library shuffles the metadata)."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that each is aligned
    out = [described(name, one) for name, one in ordered]
    data = [one.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for _, one in ordered]
    return b"".join([Shard("", tuple(out), metadata).header, *data])


def write_index(directory: Path, shards: Iterable[Shard]) -> None:
    """Write the index that libraries need where a folder has more than one shard."""
    folders: dict[Path, list[Shard]] = {}
    for shard in shards:
        folders.setdefault(Path(shard.file).parent, []).append(shard)
    for folder, listed in folders.items():
        if len(listed) > 1:
            files = {Path(shard.file).name: shard.inside for shard in listed}
            weight_map = {tensor.name: file for file, inside in files.items() for tensor in inside}
            total = sum(shard.nbytes for shard in listed)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_atomically(directory / folder / index_of(next(iter(files))), json.dumps(index, indent=2) + "\n")
