"""Compare two models, or their task vectors, tensor by tensor: norms, angle, changed share, sign conflicts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from mergebench.checkpoint import adopt
from mergebench.checkpoint.files import Files
from mergebench.deltas.open import open_model
from mergebench.engine.job import Merge
from mergebench.engine.machine import keep_freed_memory, one_thread
from mergebench.engine.noise import TILE
from mergebench.engine.plan import plan_merge
from mergebench.engine.profile import sign_conflicts
from mergebench.engine.read import ChunkReader
from mergebench.engine.span import Span
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


def differences(a: str, b: str, base: str | None = None) -> list[Difference]:
    """Compare every float tensor of two models, in A's file order, in the memory of a few chunks."""
    first = open_model(a)
    others = (open_model(reference) for reference in (b, *([base] if base is not None else [])))
    models = (first, *(adopt(first, model) for model in others))
    linear = get("linear")
    params = linear.make_params({"weight": (1.0,) * len(models), "normalize": False})
    names = ("A", "B", "base")[: len(models)]
    plan = plan_merge(
        Merge(method=linear, params=params, base=None, models=models, names=names), workers=1, device="cpu"
    )
    keep_freed_memory()
    with Files() as files, torch.inference_mode(), one_thread():  # the dot products are short
        reader = ChunkReader(plan, files)
        return [_difference(reader, name, models[0].tensors[name].numel) for name in plan.alignment.merged]


def _difference(reader: ChunkReader, name: str, numel: int) -> Difference:
    squares_a = squares_b = dot = squares_d = 0.0
    changed = conflicts = both = 0
    for start in range(0, numel, TILE):
        values, _ = reader.load([Span(name, start, min(start + TILE, numel))], apply=False)
        if len(values) == 3:
            values = values[:2] - values[2]
        left, right = (row.double() for row in values)
        distance = right - left
        squares_a += float(left.dot(left))
        squares_b += float(right.dot(right))
        dot += float(left.dot(right))
        squares_d += float(distance.dot(distance))
        changed += int(distance.count_nonzero())
        opposed, shared = sign_conflicts(values)
        conflicts, both = conflicts + opposed, both + shared
    norm_a, norm_b = math.sqrt(squares_a), math.sqrt(squares_b)
    return Difference(
        tensor=name,
        norm_ratio=norm_b / norm_a if norm_a else (1.0 if norm_b == 0 else math.inf),
        cosine=dot / (norm_a * norm_b) if norm_a and norm_b else (1.0 if norm_a == norm_b else 0.0),
        relative_distance=math.sqrt(squares_d) / norm_a if norm_a else (0.0 if norm_b == 0 else math.inf),
        changed=changed / max(numel, 1),
        sign_conflict=conflicts / both if both and len(reader.plan.merge.models) == 3 else 0.0,
    )
