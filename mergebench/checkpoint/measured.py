"""What a model did on data, tensor by tensor: the files that data-driven merge methods read beside the model.

One .safetensors file, float32, under the model's own tensor names. Its kinds:

    fisher        NAME [as the weight]: mean squared gradient of log p(y | x), the diagonal of the Fisher information
    gram          NAME [inputs, inputs] of a linear layer: the mean of x x^T over the tokens
    coefficients  NAME []: the factor of the model's task vector

The metadata say which model and which data it was made of (`About`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from mergebench.checkpoint.content import identity
from mergebench.checkpoint.documents import parse_json
from mergebench.checkpoint.header import Header, TensorInfo, damaged, read_header
from mergebench.checkpoint.model import Model
from mergebench.errors import ModelError

MeasuredKind = Literal["fisher", "gram", "coefficients"]
FILE = "statistics.safetensors"
METADATA = "mergebench.statistics"


class _Required(TypedDict):
    kind: str
    model: dict[str, str]  # reference, identity
    data: dict[str, str]  # file, sha256


class About(_Required, total=False):
    """What the metadata say; the first three always."""

    items: int
    tokens: int
    texts: str  # a hash of each text, so that a suite with the same texts is noticed
    labels: str | None  # model | true
    norm: float  # of all values together, L2
    inputs_first: list[str]  # weights stored as [inputs, outputs]
    settings: dict[str, Any]
    made: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """The statistics of one model: headers are read and checked, data is not touched."""

    header: Header
    about: About
    names: Mapping[tuple[object, ...], str] = field(default_factory=dict, repr=False)  # own names, by a tensor's place

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {tensor.name: tensor for tensor in self.header.tensors}

    @property
    def file(self) -> Path:
        return self.header.file

    def doubt(self) -> str | None:
        """A warning if they are of too few texts to tell much."""
        tokens, inputs = (
            self.about.get("tokens", 0),
            max((one.shape[0] for one in self.header.tensors if one.shape), default=0),
        )
        if self.about["kind"] == "gram" and tokens < inputs:
            return f"{tokens:,} tokens for up to {inputs:,} inputs: the Gram matrices have directions without any"
        return None

    def own_name(self, info: TensorInfo) -> str:
        """The name, in the model's own files, of a tensor that may be read under another."""
        return self.names.get(info.place, info.name)


def read_measured(place: Path) -> Measured:
    """Read the header of a file of statistics, or of the one in a directory; `ModelError` if there is none."""
    file = place / FILE if place.is_dir() else place
    if not file.exists():
        raise ModelError(f"{place}: it holds no {FILE}" if place.is_dir() else f"{place}: no such file", MAKE)
    header = read_header(file)
    if METADATA not in header.metadata:
        raise ModelError(f"{file}: it holds no statistics of a model", MAKE)
    try:
        about = parse_json(header.metadata[METADATA], About)
    except ValueError as error:
        raise damaged(file, f"not readable as statistics: {error}") from None
    if any(tensor.dtype != "F32" for tensor in header.tensors):
        raise damaged(file, "statistics are float32")
    return Measured(header, about)


def read_measured_of(place: Path, model: Model, kind: str, method: str) -> Measured:
    """The statistics of this model, of the kind that a merge method needs; else `ModelError`."""
    found = read_measured(place)
    made = found.about
    if made["kind"] != kind:
        raise ModelError(f"{found.file}: its kind is {made['kind']}, '{method}' needs {kind}", MAKE)
    if made["model"].get("identity") != identity(model):
        what = f"made of '{made['model'].get('reference')}', which is another model than {model.reference}"
        raise ModelError(f"{found.file}: {what}", MAKE)
    return Measured(found.header, made, names_of(model))


def names_of(model: Model) -> dict[tuple[object, ...], str]:
    """A model's tensors by their places: of one that has several names, the first."""
    return {info.place: name for name, info in reversed(model.tensors.items())}


def write_measured(
    file: Path, shapes: Mapping[str, tuple[int, ...]], values: Callable[[str], Any], about: Mapping[str, Any]
) -> None:
    """Write statistics atomically; values: a float32 tensor by name, asked for when it is written."""
    from mergebench.checkpoint.files import part_of  # these imports load torch
    from mergebench.checkpoint.shards import OutTensor, Shard, write_shard

    tensors = tuple(OutTensor(name, "F32", shape, 4 * math.prod(shape)) for name, shape in shapes.items())
    shard = Shard(part_of(file.name), tensors, {METADATA: json.dumps(about)})
    write_shard(file.parent, shard, values)
    file.with_name(shard.file).replace(file)


MAKE = "make them of that model: mergebench statistics --model MODEL --data FILE --kind KIND --out DIR"
