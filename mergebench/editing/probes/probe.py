"""A behaviour probe: a linear classifier of a model's states into desired and undesired, as a safetensors file.

Tensors `weight` [2, d] and `bias` [2] (first the desired class, then the undesired class) and `mean_diff` [d]; the
metadata key `probe` has its settings and scores as JSON. A file with `weight` alone is a probe, too, and so is a file
with `mlp.weight` and `mlp.bias`, as published by Wang et al. (arXiv:2407.08770).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from safetensors.torch import save
from torch import Tensor, zeros

from mergebench.checkpoint.content import sha256_of
from mergebench.checkpoint.documents import parse_json
from mergebench.checkpoint.files import read_tensors, write_atomically
from mergebench.checkpoint.header import FLOATS, Header, read_header
from mergebench.errors import ModelError, RecipeError, RunError

Direction = Literal["row1", "diff", "unit-diff", "mean-diff"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
PUBLISHED = "mlp."  # prefix of tensor names in probes of the paper's authors
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


class About(TypedDict, total=False):
    """What is read of a probe's metadata."""

    layer: int
    norm: Literal["pre", "post"]
    pool: Literal["mean", "last"]
    max_length: int
    classes: list[str]
    model: dict[str, Any]
    n_test: int
    test_accuracy: float | None
    majority: float | None


@dataclass(frozen=True)
class Probe:
    """A probe in memory, float32. Files of other programs may have only `weight`."""

    weight: Tensor  # [2, d]: desired, undesired
    bias: Tensor  # [2]
    mean_diff: Tensor | None = None  # [d], mean of undesired minus mean of desired features
    about: Mapping[str, Any] = field(default_factory=dict)  # settings and scores
    file: Path = Path()
    sha256: str = ""  # of the file

    @property
    def width(self) -> int:
        """d: the width of the model's residual stream."""
        return self.weight.shape[1]

    def direction(self, kind: Direction = "row1") -> Tensor:
        """[d]: from desired to undesired; `RecipeError` if the probe has no such direction.

        row1: the undesired class's row, as in the paper (arXiv:2407.08770, 3.2); diff: that minus the other row;
        unit-diff: the same at length one; mean-diff: the difference of the classes' mean features.
        """
        if kind not in DIRECTIONS:
            raise RecipeError(f"direction '{kind}' is not possible", f"known: {', '.join(DIRECTIONS)}")
        found = self.mean_diff if kind == "mean-diff" else self.weight[1]
        if found is None:
            raise RecipeError(f"{self.file}: it holds no mean_diff, which direction mean-diff is", _OTHER)
        if kind in ("diff", "unit-diff"):
            found = self.weight[1] - self.weight[0]
        if not found.any():
            raise RecipeError(f"{self.file}: its direction {kind} is zero, it points nowhere", _OTHER)
        return found / found.norm() if kind == "unit-diff" else found

    def logit(self, features: Tensor) -> Tensor:
        """[n]: the logit of features [n, d]; above zero for undesired."""
        return features @ (self.weight[1] - self.weight[0]) + (self.bias[1] - self.bias[0])

    def doubt(self) -> str | None:
        """A warning if the probe is no better on its test texts than always answering the larger class; else None."""
        accuracy, majority, n = (self.about.get(key) for key in ("test_accuracy", "majority", "n_test"))
        if accuracy is None or majority is None or not n:
            return None
        stderr = math.sqrt(accuracy * (1 - accuracy) / n)
        if accuracy >= majority + 2 * stderr:
            return None
        said = f"{accuracy:.1%} of {n} test texts right, {majority:.1%} by always saying the same"
        return f"the probe is no better than the majority: {said} (s.e. {stderr:.1%})"

    def save(self, path: Path) -> Probe:
        """Write the file atomically; returns the probe as stored."""
        tensors = {"weight": self.weight, "bias": self.bias}
        tensors |= {} if self.mean_diff is None else {"mean_diff": self.mean_diff}
        raw = save({name: one.contiguous() for name, one in tensors.items()}, {"probe": json.dumps(dict(self.about))})
        write_atomically(path, raw)
        return replace(self, file=path, sha256=hashlib.sha256(raw).hexdigest())


def read_probe(path: str | Path) -> Probe:
    """Read and check a probe; `ModelError` if there is none, `RunError` if it is damaged or not finite."""
    file = Path(path)
    if file.suffix in PICKLES and file.is_file():
        raise ModelError(f"{file}: a pickle, which is never loaded: it can run code", _SAVE)
    header = read_header(file)
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    prefix = "" if "weight" in shapes else PUBLISHED
    names = {"weight": f"{prefix}weight", "bias": f"{prefix}bias", "mean_diff": "mean_diff"}
    width = shapes.get(names["weight"], ())[1:]
    fits = {names["weight"]: (2, *width), names["bias"]: (2,), "mean_diff": width}
    mine = [tensor for tensor in header.tensors if tensor.name in fits]
    if len(width) != 1 or width[0] == 0 or any(t.shape != fits[t.name] or t.dtype not in FLOATS for t in mine):
        raise _no_probe(header)
    stored = read_tensors(header)
    found = {kind: stored[name].float() for kind, name in names.items() if name in stored}
    for kind, tensor in found.items():
        if not tensor.isfinite().all():
            raise RunError(f"{file}: {names[kind]} holds a value that is not finite", "fit the probe again")
    if not found["weight"].any():
        raise ModelError(f"{file}: its weight is all zero, it points nowhere", "fit the probe again")
    return Probe(
        found["weight"],
        found.get("bias", zeros(2)),
        found.get("mean_diff"),
        _about(header),
        file,
        sha256_of(file),
    )


def _about(header: Header) -> dict[str, Any]:
    try:
        about: dict[str, Any] = parse_json(header.metadata.get("probe", "{}"), About)
        for name in ("test_accuracy", "majority"):
            if not 0 <= (about.get(name) or 0) <= 1:
                raise ValueError(f"{name}: must be a share, got {about[name]}")
        if about.get("n_test", 0) < 0 or about.get("max_length", 2) < 2:
            raise ValueError("n_test or max_length is too small")
    except ValueError as error:
        raise RunError(f"{header.file}: its metadata 'probe': {error}", "fit the probe again") from None
    return about


def _no_probe(header: Header) -> ModelError:
    held = [f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in header.tensors]
    more = f" and {len(held) - 3} more" if len(held) > 3 else ""
    return ModelError(f"{header.file}: not a probe: it holds {', '.join(held[:3]) or 'no tensors'}{more}", _SHAPE)


_OTHER = f"choose another --direction: {', '.join(DIRECTIONS)}"
_SHAPE = (
    "a probe holds weight [2, width] and may hold bias [2] and mean_diff [width], floating point; one vector w of a "
    "binary classifier is saved as the rows -w/2 and w/2"
)
_SAVE = "save its tensors as safetensors: torch.load(FILE, weights_only=True), then safetensors.torch.save_file"
