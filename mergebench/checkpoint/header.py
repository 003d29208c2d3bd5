"""Read and check the header of one safetensors file. No tensor data is touched, torch is not needed.

A safetensors file is eight bytes of header length (little endian), a JSON header naming every
tensor's dtype, shape and byte range, and the data, without holes.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mergebench.checkpoint.documents import open_file, parse_json
from mergebench.errors import ModelError, RunError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MOST = 2**63  # elements

ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
ENCODINGS = ("float8_e4m3", "mxfp4")  # what a result may be rounded to, with scales
_ARE_FLOATS = FLOATS | FP8
GGUF_HINT = "GGUF files are made for running a model: merge the safetensors model it was made from"
_OTHER_FILES = {
    b"GGUF": ("a GGUF file", GGUF_HINT),
    b"version ": ("a pointer of Git LFS", "fetch the file itself: git lfs pull"),
}


class Scale(NamedTuple):
    """The scale of an FP8 tensor: one number for each block of elements."""

    stored: TensorInfo
    shape: tuple[int, ...]  # as many dimensions as the tensor
    blocks: tuple[int, ...]


class Reader(Protocol):
    """Reads bytes and elements of files; implemented by `files.Files`."""

    def read_into(self, tensor: TensorInfo, offset: int, buffer: memoryview) -> None: ...

    def read_elements(self, tensor: TensorInfo, start: int, out: Tensor) -> None: ...


class Made(Protocol):
    """A tensor that no file holds as it is: it has rows chosen from other tensors, or joins several."""

    @property
    def own(self) -> TensorInfo: ...  # a tensor of the model's own, as stored

    def read(self, files: Reader, start: int, out: Tensor) -> None: ...  # fill the flat `out` from element `start`

    def settle(self, files: Reader) -> None: ...  # compute now what all workers need

    def digest(self) -> str: ...  # what identifies it

    def resident(self) -> int: ...  # bytes that one worker holds to read it


class Stamp(NamedTuple):
    """What tells that a file is still the one whose header was read. Changing a file, or putting another in its place,
    gives it a new time of change (ctime), which no program can set back; some network disks give no lasting inode."""

    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class TensorInfo(NamedTuple):
    """Where one tensor lies: bytes `offset` to `offset + nbytes` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    made: Made | None = None  # None: it is stored as it is
    scale: Scale | None = None
    stamp: Stamp | None = None  # the file's, when its header was read

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def place(self) -> tuple[object, ...]:
        """Where its values lie: tensors of equal place are the same."""
        return self.file, self.offset, self.shape, self.made and self.made.digest()

    @property
    def stored_dtype(self) -> str:
        """The type on disk, bfloat16 for four bits; a tensor made of several may be read as float32."""
        return self.dtype if self.made is None else self.made.own.stored_dtype

    @property
    def is_quantized(self) -> bool:
        """Whether its values are in eight bits or fewer."""
        return self.made.own.is_quantized if self.made is not None else self.scale is not None or self.dtype in FP8

    @property
    def copied_dtype(self) -> str:
        """The type that a copy without scales has."""
        return "BF16" if self.scale is not None or (self.made is not None and self.is_quantized) else self.dtype

    @property
    def is_float(self) -> bool:
        return self.dtype in _ARE_FLOATS


@dataclass(frozen=True)
class Header:
    """The checked header of one file: its tensors in the order of their data."""

    file: Path
    tensors: list[TensorInfo]
    metadata: dict[str, str]
    sha256: str  # of the header bytes: a cheap fingerprint of names, shapes and layout
    stamp: Stamp

    def check(self) -> None:
        """`RunError` if the file is not the one that was read any more."""
        try:
            now = Stamp.of(self.file.stat())
        except OSError:
            now = None
        if now != self.stamp:
            raise changed(self.file, self.stamp, now)


def read_header(file: Path) -> Header:
    """Read the header of `file`; `RunError` if the file is damaged, `ModelError` if it is missing."""
    try:
        with open_file(file) as stream:
            status = os.fstat(stream.fileno())
            raw_length = stream.read(8)
            if len(raw_length) < 8:
                raise damaged(file, f"{status.st_size} bytes are too few for a safetensors file")
            for start, (what, hint) in _OTHER_FILES.items():
                if raw_length.startswith(start):
                    raise ModelError(f"{file}: {what}, not a safetensors file", hint)
            (length,) = struct.unpack("<Q", raw_length)
            if length > MAX_HEADER_BYTES:
                raise damaged(file, f"its header claims {length} bytes, the format allows {MAX_HEADER_BYTES}")
            if 8 + length > status.st_size:
                raise damaged(file, f"its header claims {length} bytes, the file has {status.st_size}")
            raw = stream.read(length)
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file") from None
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        entries = parse_json(raw)
    except ValueError as error:
        raise damaged(file, f"its header is {error}") from None
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(file, "its metadata is not a mapping of texts")
    stamp = Stamp.of(status)
    tensors = [_tensor(file, name, entry, 8 + length, stamp) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_layout(file, tensors, 8 + length, status.st_size)
    return Header(
        file=file,
        tensors=tensors,
        metadata=metadata,
        sha256=hashlib.sha256(raw).hexdigest(),
        stamp=stamp,
    )


def damaged(file: Path, what: str) -> RunError:
    return RunError(f"{file}: {what}", "the file is damaged or incomplete: copy or download it again")


def changed(file: Path, before: Stamp, now: Stamp | None) -> RunError:
    """The error for a file that is not as it was when its header was read; now: None if it is gone."""
    what = "it was changed, replaced or taken away after its header was read"
    hint = "run it again while no other program writes the inputs"
    if now is not None and now[:2] == before[:2]:  # writing, then setting the time back, leaves the same trace
        what = "its rights or links were changed after its header was read, or data behind its date"
        hint = "if nothing wrote to it, continue with --resume; else run it again"
    return RunError(f"{file}: {what}", hint)


def _tensor(file: Path, name: str, entry: object, data_start: int, stamp: Stamp) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
        if not isinstance(dtype, str) or not isinstance(shape, list):
            raise ValueError
        numel = 1
        for side in shape:
            if type(side) is not int or side < 0:
                raise ValueError
            numel *= side
            if side >= _MOST or numel >= _MOST:
                raise ValueError
        if type(start) is not int or type(stop) is not int or not 0 <= start <= stop:
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise damaged(file, f"its header entry for '{name}' is malformed") from None
    item = ITEM_SIZE.get(dtype)
    if item is None:
        raise ModelError(f"{file}: {name}: dtype {dtype} is not supported")
    if stop - start != numel * item:
        raise damaged(file, f"'{name}' has {stop - start} bytes, {dtype} {list(shape)} needs {numel * item}")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + start, stop - start, None, None, stamp)


def _check_layout(file: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    """The data must follow the header without holes or overlaps and end with the file."""
    end = data_start
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps" if tensor.offset < end else "leaves a hole after"
            raise damaged(file, f"the data of '{tensor.name}' {what} the tensor before it")
        end += tensor.nbytes
        if end > size:
            raise damaged(file, f"the data of '{tensor.name}' end at byte {end}, the file has {size}")
    if end != size:
        raise damaged(file, f"{size - end} bytes follow the last tensor")
