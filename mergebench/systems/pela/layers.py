"""Which layers PELA factors, by which rank (arXiv:2310.10700, section 3.1), and what their factors are called."""

from __future__ import annotations

import fnmatch
from collections.abc import Container, Sequence
from typing import NamedTuple

from mergebench.adapters.fine_tune import is_linear
from mergebench.adapters.peft_names import stored_in_out
from mergebench.checkpoint.model import Model
from mergebench.deltas.formats.compressed import names
from mergebench.errors import RecipeError, did_you_mean

LEAST_OUT = 10  # narrower layers stay dense


class Layers(NamedTuple):
    """A model's linear layers by their weights' names; why every other matrix stays dense."""

    factored: dict[str, tuple[int, int]]  # [out, in]
    left: dict[str, str]
    in_out: bool  # the weights are stored [in, out], as GPT-2's are


def written_as(name: str, factored: Container[str]) -> tuple[str, ...]:
    """The names under which a tensor is written: a factored layer's two, its bias's new one, or its own."""
    if name in factored:
        return names(name)[:2]
    weight = f"{name.removesuffix('.bias')}.weight"
    return (names(weight).bias,) if name.endswith(".bias") and weight in factored else (name,)


def rank_of(shape: tuple[int, int], ratio: float) -> int:
    """The rank at which a layer [out, in] has about 1 / `ratio` of its parameters."""
    rows, columns = shape
    return int(rows * columns // (ratio * (rows + columns)))


def saves(rank: int, shape: tuple[int, int]) -> bool:
    """Whether factors of this rank have fewer parameters than the matrix."""
    return rank * sum(shape) < shape[0] * shape[1]


def find(model: Model, ratio: float | None, omit: Sequence[str]) -> Layers:
    """Divide a model's matrices by headers alone; `RecipeError` if a glob of `omit` fits none."""
    matrices = {name: info for name, info in model.tensors.items() if info.is_float and len(info.shape) >= 2}
    for glob in omit:
        if not any(fnmatch.fnmatchcase(name, glob) for name in matrices):
            near = did_you_mean(glob, matrices) or ""
            hint = near if near.startswith("did") else "a glob of names of weights, such as *.self_attn.*"
            raise RecipeError(f"--omit: '{glob}' fits no weight of {model.reference}", hint)
    factored, left = {}, {}
    for name, info in matrices.items():
        omitted = next((glob for glob in omit if fnmatch.fnmatchcase(name, glob)), None)
        if not is_linear(name, info.shape):
            left[name] = "not the weight of a linear layer"
        elif omitted is not None:
            left[name] = f"omitted by {omitted}"
    linear = {name: info.shape for name, info in matrices.items() if name not in left}
    in_out = stored_in_out(model, linear)
    for name, stored in linear.items():
        shape = _out_in(stored, in_out)
        why = _why_left(model, name, shape, ratio)
        if why is None:
            factored[name] = shape
        else:
            left[name] = why
    return Layers(factored, left, in_out)


def _why_left(model: Model, name: str, shape: tuple[int, int], ratio: float | None) -> str | None:
    """Why a linear layer [out, in] stays dense, if headers say that it does."""
    if shape[0] < LEAST_OUT:
        return f"fewer than {LEAST_OUT} outputs"
    if ratio is None and not saves(1, shape):
        return "no rank saves parameters"
    if ratio is not None and not rank_of(shape, ratio):
        return "rank 0 at this ratio"
    taken = next((part for part in names(name) if part in model.tensors), None)
    return None if taken is None else f"'{taken}' has the name of a factor"


def _out_in(shape: tuple[int, ...], in_out: bool) -> tuple[int, int]:
    rows, columns = shape
    return (columns, rows) if in_out else (rows, columns)
