"""Never half a result: output is built in `.<name>.partial` beside its target and renamed when complete.

The partial directory is locked while the process lives. Its journal lists the complete shards with a sample of what
each holds, so that a killed run can be resumed, and what was damaged since is made again.

No rename replaces a mounted volume. There the partial directory lies inside, and its files are moved out one by one,
the one that marks a result last. The next run takes back what a killed one had moved.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mergebench.checkpoint.content import sample_of
from mergebench.checkpoint.documents import read_json
from mergebench.checkpoint.files import part_of, write_atomically, write_error
from mergebench.checkpoint.header import read_header
from mergebench.checkpoint.lineage import portable
from mergebench.checkpoint.target import (
    JOURNAL,
    PROVENANCE,
    beside,
    contents,
    is_foreign,
    moving,
    partial,
    size_on_disk,
    stays,
    target_of,
)
from mergebench.errors import MergebenchError, RecipeError, RunError

log = logging.getLogger(__name__)
begun: dict[Path, bool] = {}  # the partial directories of this process, and whether a run can be resumed from them


def left_behind() -> list[tuple[Path, int, bool]]:
    """What runs of this process that failed have left: where, bytes on disk, whether it can be resumed."""
    return [(place, size_on_disk(place), resumable) for place, resumable in begun.items() if place.is_dir()]


def _delete(directory: Path, kept: Collection[Path] = ()) -> None:
    """Delete all that is in a directory of ours; the file that marks it as ours goes last, in case this run is killed
    too."""
    kept = {*kept, *(folder for path in kept for folder in path.parents)}
    for path in sorted(directory.rglob("*"), key=lambda path: path.name == PROVENANCE):
        if path in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # its folder may be gone already


def _sample(file: Path) -> str | None:
    """What tells whether a complete file is still as it was written; None if it is gone or damaged. Of files other than
    safetensors only that they are there: whoever writes them checks them."""
    if file.suffix != ".safetensors":
        return "" if file.is_file() else None
    try:
        return sample_of(read_header(file))
    except MergebenchError:
        return None


def sealed(journal: Mapping[str, Any]) -> str:
    """A journal as JSON, with a hash of itself."""
    text = json.dumps(journal)
    return f'{text[:-1]}, "sha256": "{_seal(text)}"}}'


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Staging:
    """The partial directory of one run, locked; a context manager that on failure leaves it to be resumed.

    fingerprint: what the result depends on; empty for a run that cannot be resumed and leaves nothing behind.
    """

    def __init__(self, out: Path, fingerprint: str, resume: bool) -> None:
        self.out, self.resumable = out, bool(fingerprint)
        self._target = Path(os.path.realpath(out))  # a link is resolved, so that the rename replaces its target
        self.directory = partial(self._target)
        # shards: the complete files, each with its sample
        self.journal: dict[str, Any] = {"fingerprint": fingerprint, "shards": {}, "answers": {}}
        if self.directory.is_symlink():
            raise RecipeError(f"{self.directory}: it is a link, which mergebench did not make", "remove it")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise write_error(self.directory, error) from None
        try:
            self._take_lock()
            self._check_ours()
            self._take_back()
            if resume:
                self._read_journal(fingerprint)
            begun[self.directory] = self.resumable
            self._clear()
            self.save()
            log.debug("building %s in %s, %d files kept", out, self.directory, len(self.journal["shards"]))
        except BaseException:
            os.close(self._lock)
            raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(self._lock), self.directory.lstat())
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:  # another process holds it, or has just renamed it
            raise RunError(f"{self.out}: another run is writing it", "wait for it, or choose another --out")

    def _check_ours(self) -> None:
        """Check that the directory is from an interrupted run, because it will be deleted."""
        found = {path.name for path in self.directory.iterdir()}
        if found and found.isdisjoint({JOURNAL, part_of(JOURNAL), PROVENANCE}):
            raise RecipeError(f"{self.directory}: it exists and mergebench did not make it", "choose another --out")

    def _take_back(self) -> None:
        """Undo the moves of a run that was killed at them; what they replaced is in its place again."""
        names = moving(self.directory)
        for name in names:
            if not (self.directory / name).exists() and (moved := self._target / name).exists():
                moved.rename(self.directory / name)
        old = beside(self._target, "old")
        for path in contents(old) if names and old.is_dir() else ():
            path.rename(self._target / path.name)

    def _clear(self) -> None:
        try:
            _delete(self.directory, [self.directory / name for name in [JOURNAL, *self.journal["shards"]]])
        except OSError as error:
            raise write_error(self.directory, error) from None

    def _read_journal(self, fingerprint: str) -> None:
        try:
            journal = read_json(self.directory / JOURNAL, dict[str, Any])
        except (OSError, ValueError):
            return  # nothing to resume: start afresh
        if journal.get("fingerprint") != fingerprint:
            raise RecipeError(
                f"{self.directory}: it was begun with another recipe or other inputs",
                "run without --resume to start afresh",
            )
        if journal.pop("sha256", None) != _seal(json.dumps(journal)):
            return  # damaged
        journal.pop("moving", None)
        noted = journal["shards"].items()
        journal["shards"] = {name: sample for name, sample in noted if _sample(self.directory / name) == sample}
        if journal.get("edits", {}).keys() <= journal["shards"].keys():  # else rows were edited by a patch that is lost
            self.journal = journal

    def save(self) -> None:
        """Write the journal of complete shards."""
        write_atomically(self.directory / JOURNAL, sealed(self.journal))

    def complete(self, *files: str) -> None:
        """Note that files, named from the directory, are complete: a resumed run keeps them as they are."""
        self.journal["shards"] |= {file: _sample(self.directory / file) for file in files}
        self.save()

    def finish(
        self, provenance: Mapping[str, Any], started: float, overwrite: bool, readme: str | None = None
    ) -> dict[str, Any]:
        """Write the provenance with the seconds since `started` (of `time.perf_counter`), README.md, and publish.

        Returns the provenance as it was written.
        """
        written = {**portable(provenance, self.out), "seconds": round(time.perf_counter() - started, 3)}
        if readme is not None:
            write_atomically(self.directory / "README.md", readme)
        write_atomically(self.directory / PROVENANCE, json.dumps(written, indent=1) + "\n")
        self.publish(overwrite, sync=False)
        return written

    def publish(self, overwrite: bool, sync: bool) -> None:
        """Put the result in its place: the only moment at which one appears."""
        if sync:
            for path in [*self.directory.rglob("*"), self.directory]:
                fsync(path)
        old, put = beside(self._target, "old"), self._move if (moved := stays(self._target)) else self._rename
        try:
            put(old, overwrite)
        except OSError as error:
            raise write_error(self.out, error) from None
        if sync:
            fsync(self._target if moved else self._target.parent)
        _discard(old)
        del begun[self.directory]
        log.info("wrote %s", self.out)

    def _rename(self, old: Path, overwrite: bool) -> None:
        (self.directory / JOURNAL).unlink()
        if overwrite and self._target.exists() and any(self._target.iterdir()):
            _discard(old)
            self._target.rename(old)
        self.directory.rename(self._target)

    def _move(self, old: Path, overwrite: bool) -> None:
        """Move file by file, where the target stays; the journal says so, for a run that is killed meanwhile."""
        found = contents(self._target)
        if found and not overwrite:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        new = [path for path in contents(self.directory) if path.name != JOURNAL]
        _discard(old)
        self.journal["moving"] = [path.name for path in new]
        self.save()
        if found:
            old.mkdir(exist_ok=True)
        for path in reversed(found):
            path.rename(old / path.name)
        for path in new:
            path.rename(self._target / path.name)
        (self.directory / JOURNAL).unlink()
        self.directory.rmdir()

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        useful = self.resumable and (self.journal["shards"] or self.journal["answers"])
        if kind is not None and not useful:
            shutil.rmtree(self.directory, ignore_errors=True)
        elif kind is not None:
            log.info("%s is left, for a run that resumes", self.directory)
        os.close(self._lock)


def _discard(old: Path) -> None:
    """Delete a replaced result, as far as possible; anything else in its place stays."""
    with suppress(OSError):
        if not is_foreign(old):
            _delete(old)
            old.rmdir()


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A directory beside `out` for models that are needed for a while. What a killed run left goes with the next."""
    target = target_of(out)
    place = target / "scratch" if stays(target) else target.with_name(f"{target.name}.scratch")
    with Staging(place, "", resume=False) as staging:
        try:
            yield staging.directory
        finally:
            shutil.rmtree(staging.directory, ignore_errors=True)


def fsync(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
