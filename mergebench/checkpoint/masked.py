"""One task of several that share a vector: a mask of one bit an element, and a factor.

    OUT/model.safetensors               the vector: a difference to the base, for all tasks
    OUT/tasks/NAME/model.safetensors    the task's mask: uint8, bit i % 8 of byte i // 8 is element i's
    OUT/tasks/NAME/task.json            {"scale": its factor, ...}

As `BASE+OUT/tasks/NAME` it stands for base + scale * mask * vector, read in pieces like an adapter's difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergebench.checkpoint.header import Header, TensorInfo, read_header
from mergebench.errors import ModelError, RunError

FOLDER, CONFIG = "tasks", "task.json"
VECTOR = {"holds": "task vector"}  # metadata of a file whose tensors are differences
_HINT = "name the model that the tasks were merged on before the '+'"


@dataclass(frozen=True)
class Masked:
    """scale * mask * vector for one tensor."""

    vector: TensorInfo
    bits: TensorInfo
    scale: float

    @property
    def nbytes(self) -> int:
        return self.vector.nbytes + self.bits.nbytes


def mask_bytes(numel: int) -> int:
    """What a mask of so many elements takes."""
    return -(-numel // 8)


def is_task(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def tasks_in(directory: Path) -> list[str]:
    """The tasks that a directory holds beside their vector."""
    return sorted(path.parent.name for path in directory.glob(f"{FOLDER}/*/{CONFIG}"))


def holds_vector(headers: Iterable[Header]) -> bool:
    """Whether the tensors of these files are differences to a base, as the files say."""
    return any(header.metadata.items() >= VECTOR.items() for header in headers)


def read_task(
    directory: Path, vector: Sequence[Header], base: Mapping[str, TensorInfo]
) -> tuple[dict[str, Masked], list[Header]]:
    """What a task changes, by the base's names, and the files it is read from; vector: the files of the vector.

    Raises `ModelError` where it does not belong to this base, `RunError` where a file is damaged.
    """
    scale = _scale(directory)
    masks = [read_header(directory / header.file.name) for header in vector]
    shared = {tensor.name: tensor for header in vector for tensor in header.tensors}
    deltas = {}
    for bits in (tensor for header in masks for tensor in header.tensors):
        info, own = shared.get(bits.name), base.get(bits.name)
        if info is None or bits.dtype != "U8" or bits.shape != (mask_bytes(info.numel),):
            raise RunError(f"{bits.file}: {bits.name}: no mask of the vector's", "merge the tasks again")
        if own is None or own.shape != info.shape or not own.is_float:
            found = "does not have it" if own is None else f"has {own.dtype} {list(own.shape)}"
            raise ModelError(f"{directory}: {bits.name}: the task changes {list(info.shape)}, base {found}", _HINT)
        deltas[bits.name] = Masked(info, bits, scale)
    return deltas, [*vector, *masks]


def _scale(directory: Path) -> float:
    path = directory / CONFIG
    try:
        scale = json.loads(path.read_text(encoding="utf-8"))["scale"]
        if isinstance(scale, bool) or not math.isfinite(scale):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{path}: not readable as a task's: it needs a number 'scale'") from None
    return float(scale)
