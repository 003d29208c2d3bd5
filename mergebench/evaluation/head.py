"""A task's head: a linear layer on a pooled encoder, in `head.safetensors` beside the model it belongs to.

Tensors `weight` [classes, hidden] and `bias` [classes]; metadata, all strings: `labels` (a JSON list,
one for each class), `pooling` (mean | cls | cls+mean), `normalize` (true | false), `max_length` (tokens).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench.checkpoint.documents import parse_json
from mergebench.errors import ModelError, RunError
from mergebench.evaluation.task import Ready, Score
from mergebench.networks.features import POOLINGS, Pooling, features
from mergebench.networks.loadable import Tick

if TYPE_CHECKING:
    from torch import Tensor

    from mergebench.evaluation.labelled import Labelled
    from mergebench.networks.network import Network

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Head:
    """A head in memory, float32."""

    file: Path
    weight: Tensor  # [classes, hidden]
    bias: Tensor  # [classes]
    labels: tuple[str, ...]
    pooling: Pooling
    max_length: int | None  # tokens a text was cut to in training

    def task(self, data: Labelled, file: Path) -> Ready:
        """The task of measuring this head's accuracy on the items of a data file."""
        data.known(self.labels, self.file)

        def measure(network: Network, tick: Tick) -> Score:
            takes, gives = self.weight.shape[1], self.pooling.width(network.hidden)
            if takes != gives:
                raise ModelError(
                    f"{self.file}: it takes {takes} features, model '{network.name}' gives {gives}",
                    "a head fits the base it was trained on",
                )
            logits = self.logits(features(data.inputs, network, self.pooling, tick))
            return data.score([self.labels[i] for i in logits.argmax(1).tolist()])

        files, home = (file, self.file), self.file.parent
        return Ready(
            len(data.rows), measure, files=files, items=data.items, asked=data.asked, versions=data.versions, home=home
        )

    def logits(self, rows: Tensor) -> Tensor:
        """[items, classes] from rows of features [items, width]."""
        return rows @ self.weight.T + self.bias

    def dump(self) -> bytes:
        """The file's content, which `read_head` reads."""
        from mergebench.checkpoint.shards import as_file

        about = {"labels": json.dumps(self.labels), "pooling": self.pooling.how}
        about["normalize"] = json.dumps(self.pooling.normalize)
        if self.max_length is not None:
            about["max_length"] = str(self.max_length)
        tensors = {"weight": self.weight, "bias": self.bias}
        return as_file({name: tensor.detach().float().cpu() for name, tensor in tensors.items()}, about)


def read_head(file: Path) -> Head:
    """Read and check a head; `ModelError` if the file is no head."""
    from mergebench.checkpoint.files import read_tensors
    from mergebench.checkpoint.header import read_header

    header = read_header(file)
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    weight, bias = shapes.get("weight", ()), shapes.get("bias", ())
    floats = all(tensor.dtype in FLOATS for tensor in header.tensors)
    if shapes.keys() != {"weight", "bias"} or len(weight) != 2 or bias != weight[:1] or not floats:
        found = ", ".join(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in header.tensors)
        raise ModelError(
            f"{file}: not a head: it holds {found or 'no tensors'}",
            "a head holds weight [classes, hidden] and bias [classes], floating point",
        )
    labels = _metadata(file, header.metadata, "labels")
    if not (isinstance(labels, list) and all(isinstance(label, str) or type(label) is int for label in labels)):
        raise _bad(file, "labels", labels, "a JSON list of words, or of whole numbers")
    labels = [str(label) for label in labels]  # as in data, whole numbers count as words
    if len(set(labels)) != len(labels) or len(labels) != weight[0]:
        raise ModelError(f"{file}: {len(set(labels))} different labels for {weight[0]} classes")
    pooling = header.metadata.get("pooling")
    if pooling not in POOLINGS:
        raise _bad(file, "pooling", pooling, f"one of {', '.join(POOLINGS)}")
    normalize = header.metadata.get("normalize", "false")
    if normalize not in ("true", "false"):
        raise _bad(file, "normalize", normalize, "true or false")
    max_length = None
    if "max_length" in header.metadata:
        max_length = _metadata(file, header.metadata, "max_length")
        if type(max_length) is not int or max_length < 1:
            raise _bad(file, "max_length", max_length, "a number of tokens")
    tensors = {name: tensor.float() for name, tensor in read_tensors(header).items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise RunError(f"{file}: {name} holds a value that is not finite")
    how = Pooling(pooling, normalize == "true")
    return Head(file, tensors["weight"], tensors["bias"], tuple(labels), how, max_length)


def _metadata(file: Path, metadata: dict[str, str], name: str) -> Any:
    try:
        return parse_json(metadata[name], Any)
    except (KeyError, ValueError):
        raise _bad(file, name, metadata.get(name), "JSON") from None


def _bad(file: Path, name: str, value: object, wanted: str) -> ModelError:
    got = "it has none" if value is None else f"got {value!r:.60}"
    return ModelError(f"{file}: metadata '{name}' must be {wanted}, {got}", "save the head with its metadata")
