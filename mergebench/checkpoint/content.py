"""Identify a model: by a hash of all its files, or by an identity from a sample of every tensor.

Results stored under a hash are found again if the files move. An identity keeps a file made for one model from being
used on another. A sample of a file keeps a result from being continued with another file in its place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from mergebench.checkpoint.documents import fault_of, open_file, read_bytes, read_json
from mergebench.checkpoint.header import ITEM_SIZE, Header, Stamp, TensorInfo
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.side_files import decisive_files, tokenizer_files
from mergebench.errors import RunError

log = logging.getLogger(__name__)
PIECES, ELEMENTS = 8, 256  # sampled from a tensor: 4 KiB at 16 bits
AT_ONCE = 1 << 16  # bytes of small neighbours that are read at once


def identity(model: Model) -> str:
    """16 hex digits, equal for equal models however they are cut into shards: a hash of every tensor's name, type,
    shape and some of its elements, the adapter's too.

    The sample is eight evenly spaced pieces, because an edit of a few rows may not touch the first ones. It tells
    fine-tunes and edits apart in a second, but does not prove that two models are equal.
    """
    found = []
    for header in model.headers:
        for tensor, digest in zip(header.tensors, samples_of(header), strict=True):
            found.append((tensor.name, tensor.dtype, tensor.shape, digest))
    if model.delta_digest is not None:
        found.append(("deltas", "", (), model.delta_digest))
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()[:16]


def sample_of(header: Header) -> str:
    """A hash of a file's header and of some elements of each of its tensors, wherever the file lies."""
    return hashlib.sha256(json.dumps([header.sha256, samples_of(header)]).encode()).hexdigest()


def samples_of(header: Header) -> list[str]:
    """A hash of some elements of each tensor: all of a small one, else pieces from its first to its last."""
    return _samples(_Sampled(header.file, header.sha256, header.stamp, header.tensors))


@dataclass(frozen=True)
class _Sampled:
    """A file, known again by its header's hash and its stamp: comparing its tensors would take longer than the rest."""

    file: Path
    sha256: str
    stamp: Stamp
    tensors: Sequence[TensorInfo] = field(compare=False)


@lru_cache(maxsize=256)  # a search plans the same merge again and again
def _samples(of: _Sampled) -> list[str]:
    from mergebench.checkpoint.files import Files  # this import loads torch

    tensors = of.tensors
    found = []
    block, first, end = memoryview(b""), 0, max((one.offset + one.nbytes for one in tensors), default=0)
    with Files() as files:
        for tensor in tensors:
            numel, item, size = tensor.numel, ITEM_SIZE[tensor.dtype], ELEMENTS * ITEM_SIZE[tensor.dtype]
            if numel <= PIECES * ELEMENTS:  # with its neighbours
                at = tensor.offset - first
                if not 0 <= at <= len(block) - tensor.nbytes:
                    first, at = tensor.offset, 0
                    block = memoryview(bytearray(min(max(AT_ONCE, tensor.nbytes), end - first)))
                    files.read_into(tensor, 0, block)
                sample = block[at : at + tensor.nbytes]
            else:
                sample = memoryview(bytearray(PIECES * size))
                for number in range(PIECES):
                    start = number * (numel - ELEMENTS) // (PIECES - 1)
                    files.read_into(tensor, start * item, sample[number * size : (number + 1) * size])
            found.append(hashlib.sha256(sample).hexdigest())
    return found


class Contents:
    """Hashes of files, cached in a folder by path and stamp, because hashing 2 GB takes a second.

    folder: None to cache in this object only.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def of_model(self, model: object) -> str | None:
        """A hash of every file that determines what a model computes; None for a model that is not made of files."""
        if not isinstance(model, Model):
            return None
        files = [header.file for header in model.headers]
        if model.directory is not None:
            files += decisive_files(model.side_directory)
        listed = [(file.name, self.of_file(file)) for file in files]
        for header in model.headers:
            header.check()  # what is measured is what was hashed
        if model.delta_digest is not None:
            listed.append(("deltas", model.delta_digest))
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def of_file(self, file: Path) -> str:
        """The SHA-256 of a file."""
        stamp, place = list(Stamp.of(file.stat())), str(file.resolve())
        known = self._known.get(place)
        if not (isinstance(known, list) and known[:-1] == stamp):
            self._known[place] = known = [*stamp, sha256_of(file)]
            if self.folder is not None:
                put(self.folder, "hashes.json", self._known)
        return str(known[-1])

    @cached_property
    def _known(self) -> dict[str, Any]:
        if self.folder is None:
            return {}
        with suppress(OSError, ValueError):
            known: dict[str, Any] = read_json(self.folder / "hashes.json", dict[str, list[int | str]])
            return known
        return {}


def tokenizer_hash(directory: Path) -> str:
    """The SHA-256 of the files of the tokenizer in a directory."""
    digest = hashlib.sha256()
    for file in tokenizer_files(directory):
        content = read_bytes(file)
        digest.update(f"\n{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, read now."""
    try:
        with open_file(file) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}") from None


def put(folder: Path, name: str, document: Mapping[str, Any]) -> None:
    """Write a JSON file into a folder that several programs may share; if it may not be written, that is said once."""
    from mergebench.checkpoint.files import replace_file  # this import loads torch

    text = json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        if (fault := fault_of(folder)) is not None:
            raise OSError(errno.EINVAL, fault)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / name, text, f".{name}.{os.getpid()}.part")
    except OSError as error:
        _warn(folder, str(error.strerror))


def may_keep(folder: Path) -> bool:
    """Whether results can be kept in a folder, there or not; if not, that is said once."""
    try:
        place = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    except OSError as error:
        _warn(folder, str(error.strerror))
        return False
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return True
    _warn(folder, os.strerror(errno.EACCES if place.is_dir() else errno.ENOTDIR))
    return False


@lru_cache
def _warn(folder: Path, why: str) -> None:
    log.warning("%s: no result is kept there: %s (--results DIR names another folder)", folder, why)
