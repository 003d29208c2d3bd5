"""File input and output: `pread` into the caller's buffers, `pwrite`, whole files written atomically.

Memory-mapped pages would count against a user's memory limit; reused buffers do not grow.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from mergebench.checkpoint.documents import descriptor
from mergebench.checkpoint.header import ITEM_SIZE, Header, Reader, Stamp, TensorInfo, changed, damaged
from mergebench.errors import DiskFull, RunError

TORCH_DTYPE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "C64": torch.complex64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
DTYPE_NAME = {dtype: name for name, dtype in TORCH_DTYPE.items()}
# bytes of a write: for larger writes the kernel looks for larger runs of free pages, at twice the cost
AT_ONCE = 128 << 10
MOST_ADVISED = 16 << 20  # bytes; neighbours in one file may be far apart in another


class Files:
    """Open file descriptors, shared by all threads (`pread` has no position to fight over).

    A file that is not the one whose header was read is refused: when it is opened, and at the end of the context.
    """

    def __init__(self) -> None:
        self._open: dict[Path, tuple[int, Stamp]] = {}
        self._lock = threading.Lock()

    def _descriptor(self, tensor: TensorInfo) -> int:
        file = tensor.file
        opened = self._open.get(file)
        if opened is None:
            with self._lock:
                if file not in self._open:
                    try:
                        number = descriptor(file)
                    except OSError as error:
                        raise RunError(f"{file}: cannot be read: {error.strerror}") from None
                    self._open[file] = number, Stamp.of(os.fstat(number))
                opened = self._open[file]
        number, stamp = opened
        if tensor.stamp is not None and tensor.stamp != stamp:
            raise changed(file, tensor.stamp, stamp)
        return number

    def close(self) -> None:
        with self._lock:
            for number, _ in self._open.values():
                os.close(number)
            self._open.clear()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self.close()

    def check(self) -> None:
        """`RunError` if a file was changed since it was opened."""
        for file, (number, before) in self._open.items():
            now = Stamp.of(os.fstat(number))
            if before != now:
                raise changed(file, before, now)

    def read_into(self, tensor: TensorInfo, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a tensor at `offset`."""
        number, at, got = self._descriptor(tensor), tensor.offset + offset, 0
        while got < len(buffer):
            try:
                count = os.preadv(number, [buffer[got:]], at + got)
            except OSError as error:
                raise RunError(f"{tensor.file}: cannot be read: {error.strerror}") from None
            if count == 0:
                raise damaged(tensor.file, "it became shorter while it was read")
            got += count

    def read_elements(self, tensor: TensorInfo, start: int, out: Tensor) -> None:
        """Fill the flat `out` (the tensor's own dtype) with elements `start` onwards."""
        if tensor.made is not None:
            tensor.made.read(self, start, out)
            return
        item = out.element_size()
        view = out.view(torch.uint8).numpy().data
        self.read_into(tensor, start * item, view)

    def advise(self, first: TensorInfo, start: int, last: TensorInfo, stop: int) -> None:
        """Tell the kernel that what lies from element `start` of a tensor to `stop` of another will be wanted soon."""
        made = first.made is not None or last.made is not None or first.file is not last.file
        if hasattr(os, "posix_fadvise") and not made:
            where = first.offset + start * ITEM_SIZE[first.dtype]
            size = last.offset + stop * ITEM_SIZE[last.dtype] - where
            if first is last or 0 < size <= MOST_ADVISED:
                os.posix_fadvise(self._descriptor(first), where, size, os.POSIX_FADV_WILLNEED)


def whole(files: Reader, tensor: TensorInfo) -> Tensor:
    """One tensor as stored."""
    out = torch.empty(tensor.numel, dtype=TORCH_DTYPE[tensor.dtype])
    if tensor.numel:
        files.read_elements(tensor, 0, out)
    return out.reshape(tensor.shape)


def read_tensors(header: Header) -> dict[str, Tensor]:
    """All tensors of a small file, as stored."""
    with Files() as files:
        return {info.name: whole(files, info) for info in header.tensors}


def put(file: int, raw: memoryview, at: int) -> None:
    while raw:
        count = os.pwrite(file, raw[:AT_ONCE], at)
        raw, at = raw[count:], at + count


def write_error(path: Path, error: OSError) -> RunError:
    message = f"{path}: cannot be written: {error.strerror}"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full:
        return DiskFull(message, "free some space")
    shut = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
    return RunError(message, "name a place that you may write to" if shut else None)


def part_of(name: str) -> str:
    """The name of a file until it is complete."""
    return f".{name}.part"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file atomically: readers see the old file or the new one. `RunError` if it cannot be written."""
    try:
        replace_file(path, content, part_of(path.name))
    except OSError as error:
        raise write_error(path, error) from None


def replace_file(path: Path, content: str | bytes, part: str) -> None:
    """The same; part: the file's name until it is complete. Raises `OSError`."""
    unfinished = path.with_name(part)
    try:
        unfinished.unlink(missing_ok=True)  # a link there would be followed
        # a path that is not UTF-8 comes with halves of characters, which are written as JSON writes them
        unfinished.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        unfinished.replace(path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes; `RunError` names the file that could not be read, or written."""
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        if error.filename == str(source) and error.filename2 is None:  # it could not be opened
            raise RunError(f"{source}: cannot be read: {error.strerror}") from None
        raise write_error(target, error) from None
