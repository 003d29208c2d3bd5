"""Compare two models, or their task vectors, tensor by tensor: norms, angle, changed share, sign conflicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from glob import escape
from typing import NamedTuple

import torch
from torch import Tensor

from mergebench.checkpoint import Model, adopt
from mergebench.checkpoint.align import align
from mergebench.checkpoint.files import Files
from mergebench.deltas.open import open_model
from mergebench.engine.items import items_of
from mergebench.engine.job import Merge
from mergebench.engine.machine import keep_freed_memory, one_thread
from mergebench.engine.plan import plan_merge
from mergebench.engine.profile import sign_conflicts
from mergebench.engine.read import ChunkReader
from mergebench.errors import ModelError
from mergebench.methods import get


class Difference(NamedTuple):
    """A tensor of B compared with A's (with a base: their task vectors).

    norm_ratio: |B| / |A|. cosine: of the angle between them. relative_distance: |B - A| / |A|.
    changed: share of elements that differ. sign_conflict: share with opposite signs among the elements
    that both changed (0 without a base).
    """

    tensor: str
    norm_ratio: float
    cosine: float
    relative_distance: float
    changed: float
    sign_conflict: float


class Differences(NamedTuple):
    """Two models compared: tensors in A's file order, and all of them as one."""

    rows: list[Difference]
    total: Difference
    left_out: Mapping[str, str]  # embeddings and heads of other vocabularies: how many tokens each model has


def differences(
    a: str, b: str, base: str | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Differences:
    """Compare every float tensor of two models, in the memory of a few chunks.

    progress: called with the tensors begun and the total. Raises `ModelError` if a model is missing, or another tensor
    than those of the vocabulary does not fit.
    """
    first = open_model(a)
    others = (open_model(reference) for reference in (b, *([base] if base is not None else [])))
    models = (first, *(adopt(first, model) for model in others))
    left_out = _other_tokens(models)
    linear = get("linear")
    params = linear.make_params({"weight": (1.0,) * len(models), "normalize": False})
    names = ("A", "B", "base")[: len(models)]
    merge = Merge(method=linear, params=params, base=None, models=models, names=names)
    plan = plan_merge(replace(merge, exclude=tuple(map(escape, left_out))), workers=1, device="cpu")
    keep_freed_memory()
    sums: dict[str, Sequence[float]] = {}
    with Files() as files, torch.inference_mode(), one_thread():  # the dot products are short
        reader = ChunkReader(plan, files)
        for item in items_of(plan, ((name, number) for number, name in enumerate(plan.alignment.merged))):
            values, _ = reader.load(item.spans, apply=False, alike=True)
            for span, found in zip(item.spans, _sums(values, [span.numel for span in item.spans]), strict=True):
                before = sums.get(span.tensor, (0.0,) * len(found))
                sums[span.tensor] = [one + more for one, more in zip(before, found, strict=True)]
            progress(len(sums), len(plan.alignment.merged))
    rows = [_difference(name, first.tensors[name].numel, *found) for name, found in sums.items()]
    everything = [sum(column) for column in zip(*sums.values(), strict=True)]
    numel = sum(first.tensors[name].numel for name in sums)
    return Differences(rows, _difference("all", numel, *everything), left_out)


def _other_tokens(models: Sequence[Model]) -> dict[str, str]:
    """The tensors that differ by the vocabulary alone; `ModelError` if any other does not fit."""
    first, *others = models
    found = {}
    problems = align(first, others, lambda name: True).problems
    for problem in sorted(problems, key=lambda problem: problem.kind == "tokens"):
        shapes = {one.reference: _shape(one, problem.name) for one in (first, problem.model)}
        if problem.kind != "tokens":
            more = f" (and {len(problems) - 1} more)" * (len(problems) > 1)
            said = ", ".join(f"{reference} has {shape}" for reference, shape in shapes.items())
            hint = "only models of one architecture and size are compared; mergebench inspect shows each"
            raise ModelError(f"{problem.name}: {said}{more}", hint)
        found[problem.name] = " against ".join(map(str, shapes.values()))
    return found


def _shape(model: Model, name: str) -> str:
    info = model.tensors.get(name)
    return "no such tensor" if info is None else f"{info.dtype} {list(info.shape)}"


def _sums(values: Tensor, sizes: list[int]) -> Iterator[tuple[float, ...]]:
    """For each of the tensors in a chunk [models, elements]: |A|^2, |B|^2, A B, |B - A|^2, and the numbers of elements
    that differ, that have opposite signs, and that both changed."""
    based = len(values) == 3
    if based:
        values = values[:2] - values[2]
    left, right = (row.double() for row in values)
    parts = (torch.split(row, sizes) for row in (left, right, right - left))
    for a, b, d, both in zip(*parts, torch.split(values, sizes, dim=1), strict=True):
        products = torch.stack((a.dot(a), b.dot(b), a.dot(b), d.dot(d))).tolist()
        yield (*products, int(d.count_nonzero()), *(sign_conflicts(both) if based else (0, 0)))


def _difference(
    name: str, numel: int, squares_a: float, squares_b: float, dot: float, squares_d: float, *counts: float
) -> Difference:
    changed, conflicts, both = counts
    norm_a, norm_b = math.sqrt(squares_a), math.sqrt(squares_b)
    return Difference(
        tensor=name,
        norm_ratio=norm_b / norm_a if norm_a else (1.0 if norm_b == 0 else math.inf),
        cosine=dot / (norm_a * norm_b) if norm_a and norm_b else (1.0 if norm_a == norm_b else 0.0),
        relative_distance=math.sqrt(squares_d) / norm_a if norm_a else (0.0 if norm_b == 0 else math.inf),
        changed=changed / max(numel, 1),
        sign_conflict=conflicts / both if both else 0.0,
    )
