"""What the models did on data: their statistics, found by tensor and read for a chunk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergebench.checkpoint.files import Files
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.measured import MAKE
from mergebench.engine.context import OnData
from mergebench.engine.job import Merge
from mergebench.engine.span import Span
from mergebench.errors import ModelError, RunError

Found = Mapping[str, tuple[TensorInfo, ...]]  # by merged tensor, one for each model


def find(merge: Merge, sources: Mapping[str, Sequence[TensorInfo]]) -> dict[str, tuple[TensorInfo, ...]]:
    """The statistics of every merged tensor that has some; `ModelError` if a model lacks what it needs."""
    found: dict[str, tuple[TensorInfo, ...]] = {}
    if not merge.statistics:
        return found
    kind, tensors = merge.method.statistics, [one.tensors for one in merge.statistics]
    for name, infos in sources.items():
        names = [one.own_name(info) for one, info in zip(merge.statistics, infos, strict=True)]
        listed = [own.get(wanted) for own, wanted in zip(tensors, names, strict=True)]
        if kind == "gram" and (not any(listed) or not merge.method.whole(name, infos[0].shape)):
            continue  # no linear layer: averaged
        for one, info, measured, own in zip(listed, infos, merge.statistics, names, strict=True):
            if one is None:
                raise ModelError(f"{measured.file}: it has no '{own}', which is merged", MAKE)
            if one.shape not in _shapes(kind, info.shape):
                what = f"'{own}' has {list(one.shape)}, the weight has {list(info.shape)}"
                raise ModelError(f"{measured.file}: {what}", MAKE)
        found[name] = tuple(one for one in listed if one is not None)
    return found


def _shapes(kind: str | None, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes that statistics of a tensor may have."""
    if kind == "gram":
        return [(side, side) for side in shape]
    return [shape if kind == "fisher" else ()]


class DataReader:
    """Reads the statistics of a worker's chunks into a buffer of its own."""

    def __init__(self, merge: Merge, found: Found, files: Files, device: torch.device) -> None:
        self._merge, self._found, self._files, self._device = merge, found, files, device
        self._norms = tuple(one.about.get("norm", 0.0) for one in merge.statistics)
        self._buffer = torch.empty(0)

    def read(self, spans: Sequence[Span]) -> OnData | None:
        """The statistics of a chunk, valid until the next is read; None if its tensor has none."""
        name, kind = spans[0].tensor, self._merge.method.statistics
        if name not in self._found:
            return None
        infos, numel = self._found[name], sum(span.numel for span in spans)
        size = infos[0].numel if kind == "gram" else numel
        if len(self._buffer) < len(infos) * size:
            self._buffer = torch.empty(len(infos) * size)
        values = self._buffer[: len(infos) * size].view(len(infos), size)
        if kind == "gram":
            for info, row in zip(infos, values, strict=True):
                self._files.read_elements(info, 0, row)
        else:
            at = 0
            for span in spans:
                for info, row in zip(self._found[span.tensor], values, strict=True):
                    part = row[at : at + span.numel]
                    if kind == "coefficients":
                        self._files.read_elements(info, 0, part[:1])
                        part[1:] = part[0].clone()
                    else:
                        self._files.read_elements(info, span.start, part)
                at += span.numel
        for number, row in enumerate(values):
            if not math.isfinite(row.sum()) and not torch.isfinite(row).all():
                file = self._merge.statistics[number].file
                raise RunError(f"{file}: '{infos[number].name}' holds a value that is not finite", MAKE)
        if kind == "fisher" and values.amin() < 0:
            raise RunError(f"{infos[0].file}: '{infos[0].name}' holds a value below zero, no square", MAKE)
        first = infos[0].name in self._merge.statistics[0].about.get("inputs_first", ())
        shaped = values.view(len(infos), *infos[0].shape) if kind == "gram" else values
        return OnData(shaped.to(self._device), self._norms, first)


def toy(merge: Merge, shape: tuple[int, ...], numel: int, device: torch.device) -> OnData | None:
    """Statistics of a toy chunk."""
    kind, models = merge.method.statistics, len(merge.models)
    if kind is None:
        return None
    values: Tensor = torch.ones(models, numel, device=device)
    if kind == "gram":
        if not merge.method.whole("toy", shape):
            return None
        values = torch.eye(shape[1], device=device).expand(models, -1, -1)
    return OnData(values, (1.0,) * models)
