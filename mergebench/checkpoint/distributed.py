"""Checkpoints in shards of ranks, as `torch.distributed.checkpoint` (DCP) writes them, for FSDP and other trainers.

A directory holds `.metadata`, a pickle that says what is where, and a file for each rank and writer, `__0_0.distcp`.
Such a file is what `torch.save` made of one piece of a tensor after the other: zip archives, in which the piece's
elements are a member that is not compressed. So the elements of every tensor lie in runs of bytes that this file finds;
they are read like those of any other file. Neither pickle is loaded by torch: it gives plain records here, no code.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mergebench.checkpoint.boxes import Box, Laid, strides_of
from mergebench.checkpoint.documents import open_file, read_bytes
from mergebench.checkpoint.header import ITEM_SIZE, Header, Stamp, TensorInfo, damaged
from mergebench.checkpoint.names import unwrapped
from mergebench.errors import ModelError

METADATA, SHARD = ".metadata", ".distcp"
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
MODELS = ("model", "state_dict", "module")  # the key of the weights, beside those of the optimiser
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name
_FLAT = ("_flat_param", "flat_param_0")
WHOLE = "save the run again with SHARDED_STATE_DICT or FULL_STATE_DICT"
WRITERS = "torch.distributed.checkpoint and its FileSystemReader read it: load it with the program that saved it"


class Sharded(NamedTuple):
    """The weights of such a checkpoint."""

    headers: list[Header]  # of the ranks' files: every piece by the name of its tensor
    tensors: dict[str, TensorInfo]
    remarks: tuple[str, ...]


def find(directory: Path) -> Path | None:
    """The directory of shards that a checkpoint is, or the one in it that is not the optimiser's; None if it has none.

    `ModelError` if it has several.
    """
    if (directory / METADATA).is_file():
        return directory
    inside = [one.parent for one in sorted(directory.glob(f"*/{METADATA}")) if not one.parent.name.startswith("optim")]
    if len(inside) > 1:
        names = ", ".join(f"{directory}/{one.name}" for one in inside[:4])
        raise ModelError(f"model '{directory}': {len(inside)} folders of shards", f"name one of them: {names}")
    return inside[0] if inside else None


def read_sharded(directory: Path) -> Sharded:
    """Where the elements of each tensor lie, without reading them.

    Raises `ModelError` if it holds no weights, or what cannot be read as such; `RunError` if a file is damaged.
    """
    file = directory / METADATA
    try:
        raw = read_bytes(file)
        found = _Records(raw).load()
        stored, lies = dict(found.state_dict_metadata), {}
        for index, info in dict(found.storage_data).items():
            lies[index.fqn, tuple(getattr(index, "offset", None) or ())] = info
        names, left = _names(stored, getattr(found, "planner_data", None) or {})
        if not names:
            raise ModelError(f"{file}: it holds no weights of a model", f"its entries: {', '.join([*stored][:4])}")
        flat = next((name for name in names.values() if name.rpartition(".")[2] in _FLAT), None)
        if flat is not None:
            raise ModelError(
                f"{file}: {flat}: it holds flat parameters, which only the model's own code unfolds", WHOLE
            )
        files = _Files(directory, raw)
        tensors = {name: _tensor(name, fqn, stored[fqn], lies, files) for fqn, name in names.items()}
    except OSError as error:
        raise damaged(file, f"cannot be read: {error.strerror}") from None
    except _FAULTS as error:
        raise damaged(file, f"not readable as metadata of shards: {type(error).__name__}") from None
    more = f" and {len(left) - 1} more" if left[1:] else ""
    remarks = (f"{left[0]}{more}: no tensor, left out",) if left else ()
    return Sharded(files.headers(), tensors, remarks)


_FAULTS = (pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, KeyError, LookupError,
           MemoryError, OverflowError, RecursionError, TypeError, ValueError)  # fmt: skip


class _Record:
    """What a pickle has in place of an object: its arguments and its state, and no behaviour."""

    def __new__(cls, *args: Any, **named: Any) -> _Record:
        one = super().__new__(cls)
        one.args = args
        return one

    def __init__(self, *args: Any, **named: Any) -> None:
        pass

    args: tuple[Any, ...]

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    def __getattr__(self, name: str) -> Any:  # for the type checker: its attributes are those of the pickle
        raise AttributeError(name)


class _Records(pickle.Unpickler):
    """Reads a pickle without running anything: every class in it is a kind of `_Record`, and so are functions."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in DTYPES:
            return name
        return type(name, (_Record,), {})

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _names(stored: Mapping[str, Any], paths: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The names of the weights by those in the metadata, and what else there is in the model that is no tensor.

    paths: the keys in the nested state of the run that lead to each entry.
    """
    inner: dict[str, str] = {}
    whole: dict[str, str] = {}
    for fqn in stored:
        path = tuple(map(str, paths.get(fqn) or (fqn,)))
        if any(one.startswith("optim") for one in (*path[:-1], path[0])):
            continue
        whole[fqn] = unwrapped(".".join(path))
        at = next((at for at, key in enumerate(path[:-1]) if key in MODELS), None)
        if at is not None:
            inner[fqn] = unwrapped(".".join(path[at + 1 :]))
    chosen = inner or whole
    tensors = {fqn: name for fqn, name in chosen.items() if hasattr(stored[fqn], "chunks")}
    if len(set(tensors.values())) < len(tensors):
        raise ValueError("two entries of one name")
    return tensors, [name for fqn, name in chosen.items() if fqn not in tensors]


@dataclass(frozen=True)
class _Lies:
    """Where an entry lies in a file of shards."""

    file: str
    offset: int
    length: int


class _Files:
    """The files of the ranks, with the pieces that were found in them."""

    def __init__(self, directory: Path, content: bytes) -> None:
        self._directory, self._content, self.metadata = directory, content, directory / METADATA
        self._open: dict[str, tuple[Path, Stamp, list[TensorInfo]]] = {}

    def piece(self, name: str, dtype: str, shape: tuple[int, ...], lies: _Lies) -> _Piece:
        """The run of bytes that holds a piece's elements, and how they lie in it."""
        place, stamp, pieces = self._known(lies.file)
        with open_file(place) as stream:
            view = _view(place, stream, lies)
        numel = view.nbytes // ITEM_SIZE[dtype]
        last = view.start + sum((side - 1) * stride for side, stride in zip(view.size, view.strides, strict=True))
        if view.size != shape or view.nbytes % ITEM_SIZE[dtype] or not 0 <= view.start <= last < numel:
            raise damaged(place, f"{name}: {view.nbytes} bytes do not hold {dtype} {list(shape)}")
        info = TensorInfo(name, dtype, (numel,), place, view.offset, view.nbytes, None, None, stamp)
        pieces.append(info)
        return _Piece(info, view.start, view.strides)

    def headers(self) -> list[Header]:
        found = []
        for name, (place, stamp, pieces) in sorted(self._open.items()):
            digest = hashlib.sha256(self._content + name.encode()).hexdigest()
            found.append(Header(place, sorted(pieces, key=lambda one: one.offset), {}, digest, stamp))
        return found

    def _known(self, file: str) -> tuple[Path, Stamp, list[TensorInfo]]:
        if file not in self._open:
            place = self._directory / file
            if Path(file).name != file or file in ("", ".", ".."):
                raise damaged(self.metadata, f"it names '{file}', which is outside its directory")
            try:
                self._open[file] = place, Stamp.of(place.stat()), []
            except FileNotFoundError:
                raise damaged(self.metadata, f"it names '{file}', which is missing") from None
        return self._open[file]


def _tensor(name: str, fqn: str, about: Any, lies: Mapping[Any, Any], files: _Files) -> TensorInfo:
    """A tensor as it is put together of its pieces."""
    from mergebench.checkpoint.assembled import assemble  # this import loads torch

    shape, written = tuple(about.size), about.properties
    word = written.dtype if hasattr(written, "dtype") else written.state[0]
    if not isinstance(word, str) or word not in DTYPES:
        raise ModelError(f"{name}: its type is not supported", WRITERS)
    dtype, strides = DTYPES[word], strides_of(shape)
    if 0 in shape:
        return TensorInfo(name, dtype, shape, files.metadata, 0, 0)
    pieces: dict[str, TensorInfo] = {}
    boxes: list[Box] = []
    for chunk in about.chunks:
        first, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        inside = len(first) == len(sizes) == len(shape) and all(
            min(at, size) >= 0 and at + size <= side for at, size, side in zip(first, sizes, shape, strict=True)
        )
        if not inside:
            raise ValueError("a piece outside its tensor")
        if 0 in sizes:
            continue
        where = lies[fqn, first]
        if getattr(where, "transform_descriptors", None):
            raise ModelError(f"{name}: it is stored compressed", WRITERS)
        piece = files.piece(name, dtype, sizes, _Lies(where.relative_path, where.offset, where.length))
        pieces[str(len(boxes))] = piece.info
        at = sum(one * stride for one, stride in zip(first, strides, strict=True))
        axes = zip(sizes, strides, piece.strides, strict=True)
        boxes.append(Box((), at, (), str(len(boxes)), piece.start, ()).with_axes(axes))
    laid = Laid(shape, tuple(boxes))
    if not laid.is_complete:
        raise ValueError("pieces are missing")
    return assemble(name, laid, pieces)


def _view(place: Path, stream: io.BufferedReader, lies: _Lies) -> _View:
    """How one saved tensor lies in the file."""
    try:
        if lies.offset < 0 or lies.offset + lies.length > os.fstat(stream.fileno()).st_size:
            raise ValueError("beyond its end")
        with zipfile.ZipFile(_Part(stream, lies.offset, lies.length)) as archive:
            member = next(one for one in archive.namelist() if one.endswith("/data.pkl"))
            storage, start, size, strides = _Records(archive.read(member)).load().args[:4]
            data = archive.getinfo(f"{member.removesuffix('data.pkl')}data/{storage[2]}")
        stream.seek(lies.offset + data.header_offset)
        head = stream.read(_LOCAL_HEADER)
        if data.compress_type != zipfile.ZIP_STORED or len(head) < _LOCAL_HEADER or min((*strides, 0)) < 0:
            raise ValueError("compressed")
        more = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        offset = lies.offset + data.header_offset + _LOCAL_HEADER + more
        return _View(offset, data.file_size, start, tuple(size), tuple(strides))
    except (*_FAULTS, StopIteration, zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise damaged(place, f"at byte {lies.offset}: not readable as a tensor: {type(error).__name__}") from None


class _View(NamedTuple):
    """A tensor as a view of a run of elements."""

    offset: int  # of the run in the file
    nbytes: int
    start: int
    size: tuple[int, ...]
    strides: tuple[int, ...]


class _Piece(NamedTuple):
    """A run of elements, and where in it a piece begins and how it is laid."""

    info: TensorInfo
    start: int
    strides: tuple[int, ...]


class _Part(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, stream: io.BufferedReader, offset: int, length: int) -> None:
        self._stream, self._offset, self._length, self._at = stream, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if self._at < 0:
            raise OSError("before its start")
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._offset + self._at)
        size = max(min(len(buffer), self._length - self._at), 0)
        raw = self._stream.read(size)
        buffer[: len(raw)] = raw
        self._at += len(raw)
        return len(raw)
