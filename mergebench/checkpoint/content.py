"""What files and models hold, as hashes: what is kept under them is found again wherever the files lie."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from mergebench.checkpoint import Model
from mergebench.errors import RunError

TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges*", "special_tokens_map*", "added_tokens*", "*.model", "*.tiktoken"),
    "chat_template*",
)

BESIDE = ("config.json", "generation_config.json", "*processor_config.json", *TOKENIZER_FILES)


class Contents:
    """Hashes of files, remembered in a folder by place, size and time: 2 GB are read in a second, but not often.

    folder: None to remember nothing beyond this object.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def of_model(self, model: object) -> str | None:
        """A hash of every file that says what a model computes; None for a model that is not made of files."""
        if not isinstance(model, Model):
            return None
        files = [header.file for header in model.headers]
        if model.directory is not None:
            files += sorted({file for pattern in BESIDE for file in model.side_directory.glob(pattern)})
        listed = [(file.name, self.of_file(file)) for file in files]
        if model.delta_digest is not None:
            listed.append(("deltas", model.delta_digest))
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def of_file(self, file: Path) -> str:
        """The SHA-256 of a file."""
        status, place = file.stat(), str(file.resolve())
        stamp = [status.st_size, status.st_mtime_ns]
        known = self._known.get(place)
        if not (isinstance(known, list) and known[:2] == stamp and len(known) == 3):
            self._known[place] = known = [*stamp, sha256_of(file)]
            if self.folder is not None:
                put(self.folder, "hashes.json", self._known)
        return str(known[2])

    @cached_property
    def _known(self) -> dict[str, Any]:
        if self.folder is None:
            return {}
        with suppress(OSError, ValueError):
            found = json.loads((self.folder / "hashes.json").read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        return {}


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, read now."""
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}") from None


def put(folder: Path, name: str, document: Mapping[str, Any]) -> None:
    """Write a JSON file at once; several programs may keep their results in one folder."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{name}.{os.getpid()}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)
    except OSError as error:
        what = f"{folder}: no result can be kept there: {error.strerror}"
        raise RunError(what, "choose another folder: --results DIR") from None
