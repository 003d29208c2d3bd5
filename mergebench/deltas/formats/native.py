"""mergebench's own format for deltas of every kind: one safetensors file, small beside the model.

    NAME.PART    a part of the delta on the tensor NAME, such as NAME.b and NAME.a; several deltas may share one
    NAME.orig    what the delta changes as it was, for an exact undo: the tensor, or of a delta on rows the neurons

The metadata says under `delta`, as JSON:

    {"base": which model it was made on (`content.identity`), or null,
     "shared": [names of parts that stand for themselves],
     "tensors": {NAME: {"kind": ..., "settings": {...}, "parts": {PART: its name in the file}}},
     "made": how it was made}

Older patches have `patch` instead, and can be read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, get_type_hints

import torch
from torch import Tensor

from mergebench import deltas as kinds
from mergebench.checkpoint.documents import complaint, parse_json
from mergebench.checkpoint.files import DTYPE_NAME, Files, part_of
from mergebench.checkpoint.format import Base, Deltas, delta_format
from mergebench.checkpoint.header import Header, TensorInfo, damaged, read_header
from mergebench.checkpoint.kind import Misfit, StoredDelta
from mergebench.checkpoint.shards import OutTensor, Shard, write_shard
from mergebench.errors import MergebenchError, ModelError

METADATA, BEFORE = "delta", "patch"
DELTAS = "delta.safetensors"  # the file's name in a directory that was extracted or trained
ANOTHER = "the patch belongs to another model"
WHAT = "deltas: a file of deltas ends in .safetensors"  # in errors about another name


class About(TypedDict):
    """The metadata of a file."""

    base: str | None
    shared: list[str]
    tensors: dict[str, AboutTensor]
    made: dict[str, Any]


class AboutTensor(TypedDict):
    kind: str
    settings: dict[str, Any]
    parts: dict[str, str]


class Before(TypedDict):
    """What is read of the metadata of an older patch."""

    columns: list[str]


class Entry(NamedTuple):
    """The delta on one tensor, as stored in a file."""

    kind: str
    settings: Mapping[str, Any]
    parts: Mapping[str, TensorInfo]
    orig: TensorInfo | None


@dataclass(frozen=True)
class DeltaFile:
    """A delta file with its header checked."""

    header: Header
    base: str | None
    entries: Mapping[str, Entry]  # by the changed tensor's name
    made: Mapping[str, Any]
    turned: frozenset[str] = field(default=frozenset())  # for an older patch: tensors whose neurons are columns

    @property
    def file(self) -> Path:
        return self.header.file

    def on(self, name: str, base: Base) -> StoredDelta:
        """The delta on a tensor of the base; `ModelError` if they do not fit together."""
        entry, info = self.entries[name], base.tensors.get(name)
        if info is None:
            raise ModelError(f"{self.file}: {base.reference} has no tensor '{name}'", ANOTHER)
        settings = dict(entry.settings)
        if name in self.turned and info.shape:
            settings["columns"] = info.shape[-1]
        kind = kinds.get(entry.kind)
        for setting, sort in get_type_hints(kind.parts).items():
            if setting in settings and sort in (bool, int, float, str):
                fault = complaint(settings[setting], sort, f"{name}: {setting}")
                if fault is not None:
                    raise damaged(self.file, fault)
                settings[setting] = sort(settings[setting])  # of whole numbers, torch takes small ones alone
        try:
            if not info.is_float:
                raise Misfit(f"{entry.kind} changes floats")
            delta = kind.on(info.shape, entry.parts, **settings)
            if kind.validate is not None:
                with Files() as files:
                    kind.validate(delta.load(files, torch.device("cpu")), info.shape)
        except Misfit as error:
            has = f"{base.reference} has {info.dtype} {list(info.shape)}"
            raise ModelError(f"{name}: {error}, {has}", ANOTHER) from None
        except ValueError as error:
            raise damaged(self.file, f"{name}: {error}") from None
        return delta

    def undo(self, name: str, delta: StoredDelta) -> StoredDelta:
        """The delta that undoes a delta of this file, to the bit; `ModelError` if the file does not keep the original
        values."""
        orig = self.entries[name].orig
        if orig is None:
            raise ModelError(f"{self.file}: does not keep '{name}' as it was", "without that no undo is exact")
        if "rows" not in delta.part:
            return kinds.get("dense").on(delta.shape, {"values": orig}, replace=True)
        parts = {"values": orig, "rows": delta.part["rows"]}
        return kinds.get("replaced_rows").on(delta.shape, parts, columns=delta.setting["columns"])


def tells_of_deltas(metadata: Mapping[str, str]) -> bool:
    """Whether a header's metadata mark a delta file."""
    return METADATA in metadata or BEFORE in metadata


def is_delta_file(place: Path) -> bool:
    """Whether a file's header marks a delta file; a directory stands for its `DELTAS`."""
    place = place / DELTAS if place.is_dir() else place
    if place.suffix != ".safetensors" or not place.is_file():
        return False
    try:
        return tells_of_deltas(read_header(place).metadata)
    except MergebenchError:
        return False


@delta_format(what="a file of deltas", claims=is_delta_file)
def native(file: Path, base: Base) -> Deltas:
    """The deltas of a file of ours."""
    read = read_file(file)
    return Deltas({name: read.on(name, base) for name in read.entries}, [read.header], read.base)


def read_file(file: str | Path) -> DeltaFile:
    """Read the header of a delta file; `ModelError` if it is missing or no delta file, `RunError` if damaged."""
    file = Path(file)
    header = read_header(file / DELTAS if file.is_dir() else file)
    if not tells_of_deltas(header.metadata):
        raise ModelError(f"{file}: not a patch", "a patch is what `mergebench edit` writes beside the model")
    stored = {info.name: info for info in header.tensors}
    try:
        if BEFORE in header.metadata:
            return _read_before(header, stored)
        about = parse_json(header.metadata[METADATA], About)
        entries = {
            name: Entry(
                one["kind"],
                one["settings"],
                {part: stored[where] for part, where in one["parts"].items()},
                stored.get(f"{name}.orig"),
            )
            for name, one in about["tensors"].items()
        }
    except KeyError as error:
        raise damaged(header.file, f"not readable as a patch: it has no tensor {error}") from None
    except ValueError as error:
        raise damaged(header.file, f"not readable as a patch: {error}") from None
    used = set(about["shared"]) | {
        info.name for entry in entries.values() for info in (*entry.parts.values(), entry.orig) if info
    }
    if used != stored.keys():
        raise damaged(header.file, "its tensors are not those of a patch")
    return DeltaFile(header, about["base"], entries, about["made"])


def _read_before(header: Header, stored: dict[str, TensorInfo]) -> DeltaFile:
    """Read an older patch: all deltas share `direction`; the metadata has the edit's report and `columns`."""
    made = parse_json(header.metadata[BEFORE], Before)
    turned = frozenset(made["columns"])
    names = dict.fromkeys(name.rpartition(".")[0] for name in stored if name != "direction")
    entries = {
        name: Entry(
            "row_patch",
            {},
            {"direction": stored["direction"], "rows": stored[f"{name}.rows"], "amount": stored[f"{name}.amount"]},
            stored[f"{name}.orig"],
        )
        for name in names
    }
    if len(stored) != 3 * len(entries) + 1:
        raise damaged(header.file, "its tensors are not those of a patch")
    return DeltaFile(header, None, entries, {key: value for key, value in made.items() if key != "columns"}, turned)


class Later(NamedTuple):
    """A tensor that is computed when it is written to the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Writing(NamedTuple):
    """A delta to be written: kind, settings, parts, and the names of shared parts."""

    kind: str
    settings: Mapping[str, Any]
    parts: Mapping[str, Tensor | Later]
    shared: Mapping[str, str] = {}
    orig: Tensor | Later | None = None


class Listed(NamedTuple):
    """A delta as a file's metadata list it; its parts are NAME.PART, or shared ones under names of their own."""

    kind: str
    parts: Collection[str]
    settings: Mapping[str, Any] = {}
    shared: Mapping[str, str] = {}


def metadata_of(
    listed: Mapping[str, Listed],
    shared: Collection[str] = (),
    made: Mapping[str, Any] | None = None,
    base: str | None = None,
) -> dict[str, str]:
    """The metadata of a file of these deltas, by the changed tensors' names."""
    tensors = {
        name: {
            "kind": one.kind,
            "settings": dict(one.settings),
            "parts": {part: f"{name}.{part}" for part in one.parts} | dict(one.shared),
        }
        for name, one in listed.items()
    }
    about = {"base": base, "tensors": tensors, "shared": sorted(shared), "made": dict(made or {})}
    return {METADATA: json.dumps(about)}


def write_file(
    file: Path,
    writings: Mapping[str, Writing],
    shared: Mapping[str, Tensor | Later] | None = None,
    made: Mapping[str, Any] | None = None,
    base: str | None = None,
) -> None:
    """Write a file of deltas by tensor names, atomically; `shared`: parts that several deltas use."""
    shared = shared or {}
    listed = {name: Listed(one.kind, tuple(one.parts), one.settings, one.shared) for name, one in writings.items()}
    metadata = metadata_of(listed, shared, made, base)
    tensors = dict(_named(writings, shared))
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # so that each is aligned
    out = [OutTensor(name, DTYPE_NAME[one.dtype], tuple(one.shape), one.nbytes) for name, one in ordered]
    shard = Shard(part_of(file.name), tuple(out), metadata)

    def values(name: str) -> Tensor:
        one = tensors[name]
        return one.make() if isinstance(one, Later) else one

    write_shard(file.parent, shard, values)
    file.with_name(shard.file).replace(file)


def _named(
    writings: Mapping[str, Writing], shared: Mapping[str, Tensor | Later]
) -> Iterator[tuple[str, Tensor | Later]]:
    yield from shared.items()
    for name, one in writings.items():
        for part, values in one.parts.items():
            yield f"{name}.{part}", values
        if one.orig is not None:
            yield f"{name}.orig", one.orig
