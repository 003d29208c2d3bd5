"""A task's values on a mask that several tasks share (PaFi, arXiv:2305.16742), and the file of the mask.

    mask.safetensors      NAME: int32 [k], ascending positions in the flat tensor NAME; the metadata says under `mask`,
                          as JSON, {"base": `content.identity` of the model it was made on, "sizes": elements by
                          tensor, "made": how it was made}
    values.safetensors    NAME: float32 [k], what is added at these positions; under `masked`, {"mask": the mask's file
                          name, "sha256": of that file, "base": ..., "made": ...}

The mask lies beside the values or in the folder above, so that N tasks keep one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from mergebench.checkpoint.content import identity, sha256_of
from mergebench.checkpoint.documents import parse_json
from mergebench.checkpoint.files import part_of
from mergebench.checkpoint.format import Base, Deltas, delta_format
from mergebench.checkpoint.header import Header, TensorInfo, damaged, read_header
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.shards import OutTensor, Shard, write_shard
from mergebench.deltas.formats.native import DeltaFile, Entry
from mergebench.errors import MergebenchError, ModelError

MASK, MASKED = "mask", "masked"
VALUES = "values.safetensors"


class AboutMask(TypedDict):
    """The metadata of a mask."""

    base: str | None
    sizes: dict[str, int]
    made: dict[str, Any]


class AboutValues(TypedDict):
    """What is read of the metadata of values on a mask."""

    mask: str
    sha256: str
    base: str | None


@dataclass(frozen=True)
class MaskFile:
    """A mask file with its header checked: positions by the base's tensor names."""

    header: Header
    base: str | None
    sizes: Mapping[str, int]
    made: Mapping[str, Any]

    @property
    def positions(self) -> dict[str, TensorInfo]:
        return {info.name: info for info in self.header.tensors}


def read_mask(file: Path) -> MaskFile:
    """Read the header of a mask file; `ModelError` if it is missing or no mask, `RunError` if damaged."""
    header = read_header(file)
    if MASK not in header.metadata:
        raise ModelError(f"{file}: not a mask", "a mask is what `mergebench mask magnitude` writes")
    try:
        about = parse_json(header.metadata[MASK], AboutMask)
    except ValueError as error:
        raise damaged(file, f"not readable as a mask: {error}") from None
    sizes = about["sizes"]
    if sizes.keys() != {info.name for info in header.tensors} or any(
        info.dtype != "I32" or len(info.shape) != 1 for info in header.tensors
    ):
        raise damaged(file, "its tensors are not those of a mask")
    return MaskFile(header, about["base"], sizes, about["made"])


def read_mask_of(file: Path, base: Model) -> MaskFile:
    """Read the header of a mask that was made on this model; `ModelError` if it was made on another one."""
    mask = read_mask(file)
    if mask.base != identity(base):
        raise ModelError(f"{file}: it was made on another model than {base.reference}", "make a mask of the base")
    return mask


def write_mask(
    file: Path,
    counts: Mapping[str, int],
    positions: Callable[[str], Tensor],
    sizes: Mapping[str, int],
    base: str,
    made: Mapping[str, Any],
) -> None:
    """Write a mask atomically, one tensor at a time; counts: of positions, sizes: of elements, by tensor."""
    about = {"base": base, "sizes": dict(sizes), "made": dict(made)}
    tensors = tuple(OutTensor(name, "I32", (count,), 4 * count) for name, count in counts.items())
    shard = Shard(part_of(file.name), tensors, {MASK: json.dumps(about)})
    write_shard(file.parent, shard, positions)
    file.with_name(shard.file).replace(file)


def metadata_of(mask: Path, base: str, made: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file of values on a mask."""
    about = {"mask": mask.name, "sha256": sha256_of(mask), "base": base, "made": dict(made)}
    return {MASKED: json.dumps(about)}


def places_of(values: Path, name: str) -> Iterator[Path]:
    """Where the mask of a file of values may lie."""
    folder = values.absolute().parent
    yield from (folder / name, folder.parent / name)


def _claims(place: Path) -> bool:
    if place.suffix != ".safetensors" or not place.is_file():
        return False
    try:
        return MASKED in read_header(place).metadata
    except MergebenchError:
        return False


@delta_format(what="values on a mask", claims=_claims)
def masked(file: Path, base: Base) -> Deltas:
    """The elements that a task changes: its own values, at the positions of the shared mask."""
    header = read_header(file)
    try:
        about = parse_json(header.metadata.get(MASKED, "{}"), AboutValues)
    except ValueError as error:
        raise damaged(file, f"not readable as values on a mask: {error}") from None
    name, digest, made_on = about["mask"], about["sha256"], about["base"]
    places = places_of(file, Path(name).name)
    mask = next((place for place in places if place in place.parent.iterdir()), None)
    if mask is None:
        raise ModelError(f"{file}: its mask {name} is missing", "keep it beside the values or in the folder above")
    if sha256_of(mask) != digest:
        raise ModelError(f"{file}: {mask} is another mask than the one that its values belong to")
    positions = read_mask(mask).positions
    strange = [info.name for info in header.tensors if info.name not in positions]
    if strange:
        raise damaged(file, f"{strange[0]}: the mask has no such tensor")
    entries = {
        info.name: Entry("scattered", {}, {"values": info, "indices": positions[info.name]}, None)
        for info in header.tensors
    }
    read = DeltaFile(header, made_on, entries, {})
    return Deltas({name: read.on(name, base) for name in entries}, [header, read_header(mask)], made_on)
