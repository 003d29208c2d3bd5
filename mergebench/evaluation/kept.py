"""What a folder of results keeps: which results, of what, how large, when they were used last; and deleting some."""

from __future__ import annotations

import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from mergebench.checkpoint.documents import read_json
from mergebench.errors import RecipeError, RunError

_NAME = re.compile(r"[0-9a-f]{40}")  # of a result and of a folder of features
DAY = 86_400.0


class _About(TypedDict, total=False):
    """What a result says of its origin."""

    model: str
    task: str
    suite: str | None
    files: list[str]


@dataclass(frozen=True)
class Kept:
    """One result, or the features that a probe was fitted on."""

    path: Path
    size: int  # bytes
    used: float  # seconds since 1970; a result that is found is used
    model: str = ""
    task: str = ""
    suite: str | None = None  # its file; None if that is not known
    files: tuple[str, ...] = ()  # the data and the model's directory, if it has one of its own

    @property
    def gone(self) -> bool:
        """Whether the data or the model are no longer where they were."""
        return any(not Path(file).exists() for file in self.files)

    def unused(self, days: float) -> bool:
        return time.time() - self.used > days * DAY


def kept(folder: Path) -> list[Kept]:
    """Everything in a folder of results, the last used first; `RecipeError` if there is no such folder."""
    if not folder.is_dir():
        what = "not a directory" if folder.exists() else "no such directory"
        raise RecipeError(f"{folder}: {what}", "results are kept in results/, or where --results says")
    found = [_result(path) for path in folder.iterdir() if _NAME.fullmatch(path.stem) and _own(path)]
    features = folder / "features"
    if features.is_dir() and not features.is_symlink():
        found += [
            Kept(path, sum(file.stat().st_size for file in path.rglob("*") if file.is_file()), path.stat().st_mtime)
            for path in features.iterdir()
            if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        ]
    return sorted(found, key=lambda one: -one.used)


def delete(results: list[Kept]) -> None:
    """Delete them; what another program deleted meanwhile is passed over."""
    for one in results:
        try:
            with suppress(FileNotFoundError):
                shutil.rmtree(one.path) if one.path.is_dir() else one.path.unlink()
        except OSError as error:
            raise RunError(f"{one.path}: cannot be deleted: {error.strerror}") from None


def _own(path: Path) -> bool:
    return path.suffix == ".json" and path.is_file() and not path.is_symlink()


def _result(path: Path) -> Kept:
    stat = path.stat()
    about: _About = {}
    with suppress(OSError, ValueError):  # a damaged one is listed too, and can be deleted
        about = read_json(path, _About)
    model, task, suite = about.get("model", ""), about.get("task", ""), about.get("suite")
    return Kept(path, stat.st_size, stat.st_mtime, model, task, suite, tuple(about.get("files", ())))
