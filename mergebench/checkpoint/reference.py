"""Find the path on this machine for a model reference that a user writes.

A reference is an existing path first (a directory or a `.safetensors` file), else `org/name[@revision]` or a component
of it, `org/name/unet[@revision]`, on the hub (the local cache, or a download). Each `+DELTA` puts an adapter's
directory, a patch or another delta on top.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mergebench.checkpoint.documents import read_json
from mergebench.errors import ModelError, did_you_mean, first_line

SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".spm", ".bpe", ".codes")
LEGAL = ("license", "licence", "notice", "policy")  # in the names of files that go with every copy of a model
_ANY_CASE = ["".join(f"[{letter}{letter.upper()}]" for letter in word) for word in LEGAL]
_COMPONENT = re.compile(  # folders of models on the hub
    r"unet|transformer(_2)?|vae|text_encoder(_[23])?|image_encoder|prior|decoder|controlnet|safety_checker|\d_\w+"
)
_MODULES = "[0-9]_*/pytorch_model.bin"  # never loaded: it tells that a module has weights
HUB_FILES = [
    *("*.safetensors", "tokenizer*", "vocab*", _MODULES, "README.md"),  # the card has the licence
    *(f"*{suffix}" for suffix in SIDE_SUFFIXES),
    *(f"*{word}*" for word in _ANY_CASE),
]


@dataclass(frozen=True)
class Location:
    """The path of a checkpoint, and the paths of the deltas on top of it, in order."""

    checkpoint: Path
    adapters: tuple[Path, ...] = ()

    @property
    def parts(self) -> tuple[Path, ...]:
        return self.checkpoint, *self.adapters


def locate(text: str, folders: Sequence[Path] = ()) -> Location:
    """Find a model reference; relative paths resolve against the working directory, then `folders`."""
    if existing(text, folders) is None:
        for left, right in _splits(text):
            place = existing(right, folders)
            if place is not None:  # the name of a file may contain a plus
                below = locate(left, folders)
                return Location(below.checkpoint, (*below.adapters, place))
        for left, right in _splits(text):
            below = locate(left, folders)
            return Location(below.checkpoint, (*below.adapters, locate_delta(right, folders)))
    return Location(_place(text, folders, "model"))


def locate_delta(text: str | Path, folders: Sequence[Path] = ()) -> Path:
    """Find an adapter, a patch or another delta by itself, as after a `+`: a path that exists, or one on the hub."""
    return _place(str(text), folders, "adapter")


def reference_of(place: Path) -> str:
    """What finds a path again: `org/name@COMMIT` of a snapshot in the hub's cache, or a folder of it, else the path."""
    found = _SNAPSHOT.search(str(place))
    return str(place) if found is None else f"{found[1]}/{found[2]}{found[4]}@{found[3]}"


def name_of(place: Path) -> str:
    """The last part of a path; of a snapshot in the hub's cache the repository's name."""
    found = _SNAPSHOT.search(str(place))
    if found is not None and not found[4]:
        return found[2]
    return (place.resolve() if place.name in ("", "..") else place).name  # a link keeps its own name


_SNAPSHOT = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})((?:/[\w-]+)*)$")


def _splits(text: str) -> list[tuple[str, str]]:
    """The text before and after each plus, the last plus first."""
    at = [number for number, sign in enumerate(text) if sign == "+"]
    return [(text[:n], text[n + 1 :]) for n in reversed(at) if text[:n] and text[n + 1 :]]


def existing(text: str, folders: Sequence[Path] = ()) -> Path | None:
    """The path of a text in the working directory or a folder; None if there is none."""
    try:
        path = Path(text).expanduser() if text.startswith("~") else Path(text)  # not of './~'
        return next((place for place in [path, *(folder / path for folder in folders)] if place.exists()), None)
    except PermissionError as error:
        raise ModelError(f"model '{text}': {error.filename}: permission denied") from None
    except (OSError, RuntimeError):  # too long for a path, or the home of an unknown user
        return None


def _place(text: str, folders: Sequence[Path], what: str) -> Path:
    path = existing(text, folders)
    if path is not None:
        return path
    if set("*?") & set(text):
        named = Path(text)
        there = sorted(str(one) for folder in [Path(), *folders] for one in (folder / named.parent).glob(named.name))[
            :4
        ]
        hint = f"name one {what}; here are {', '.join(there)}" if there else f"a reference names one {what}, no pattern"
        raise ModelError(f"{what} '{text}': no such file or directory", hint)
    name, _, revision = text.partition("@")
    parts = name.split("/")
    looks_like_hub = len(parts) == 2 and all(parts) and not name.startswith((".", "~", "/"))
    if len(parts) == 3 and _COMPONENT.fullmatch(parts[2]):  # else it is a path
        looks_like_hub = all(parts) and not any((place / parts[0]).exists() for place in [Path(), *folders])
    near = neighbour(text, folders)
    if not looks_like_hub or name.endswith(".safetensors"):
        if near is None and len(parts) == 1:
            near = f"a hub {what} is written org/name"
        raise ModelError(f"{what} '{text}': no such file or directory", near or looked_in(text, folders))
    found = _from_hub(f"{what} '{text}'", "/".join(parts[:2]), revision or None, near, "/".join(parts[2:]))
    if not found.exists():
        inside = sorted(file.name for file in found.parent.iterdir()) if found.parent.is_dir() else []
        raise ModelError(
            f"{what} '{text}': '{'/'.join(parts[:2])}' has no such folder", did_you_mean(found.name, inside)
        )
    return found


def looked_in(text: str, folders: Sequence[Path] = ()) -> str | None:
    """The hint for a path that is not there: one spelt like it, else where it was looked for."""
    there = "".join(f", then in {folder}" for folder in dict.fromkeys(folders) if folder != Path())
    anywhere = text.startswith(("~", "/"))
    return neighbour(text, folders) or (None if anywhere else f"looked for in the working directory{there}")


def neighbour(text: str, folders: Sequence[Path] = ()) -> str | None:
    """A hint that names the entry of the same directory that is spelt most like the path; None if none is alike."""
    path = Path(text)
    for folder in [Path(), *folders]:
        with suppress(OSError, ValueError, RuntimeError):
            there = [one.name for one in (folder / path.parent).iterdir()]
            if close := difflib.get_close_matches(path.name, there, n=1, cutoff=0.75):
                return f"did you mean '{path.parent / close[0]}'?"
    return None


def _from_hub(what: str, name: str, revision: str | None, near: str | None, folder: str = "") -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = [f"{folder}/{pattern}" for pattern in HUB_FILES] if folder else HUB_FILES
    try:
        cached = Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=True))
        if _has_weights(cached / folder):
            return cached / folder
    except (LocalEntryNotFoundError, ValueError):
        pass  # not in the cache (or a malformed name, which the second call words better)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files)) / folder
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(
            f"{what}: not found locally, in the hub cache or on the hub: {first_line(error)}",
            near or "check the name and the network, or give the path of a directory",
        ) from None


def _has_weights(snapshot: Path) -> bool:
    """Whether a cached snapshot has weights: another tool may have fetched only config and tokenizer."""
    try:
        shards = [
            index.parent / file
            for index in snapshot.rglob("*.safetensors.index.json")
            for file in read_json(index)["weight_map"].values()
        ]
        return any(snapshot.rglob("*.safetensors")) and all(file.exists() for file in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True  # opening it will report the fault
