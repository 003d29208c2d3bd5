"""Model Stock: the mean of the task vectors, shortened by the angle between them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from mergebench.engine.chunks import row_total, rows_of, total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, Tensor, merge_method
from mergebench.engine.statistics import gram
from mergebench.errors import RecipeError
from mergebench.parameters import param


@dataclass(frozen=True)
class Params:
    filter_wise: bool = param(False, "an angle for each row instead of each tensor")


@merge_method(
    takes="task_vectors", keeps_base=True, paper="arXiv:2403.19522", cut=lambda p: "row" if p.filter_wise else "element"
)
def model_stock(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Base plus the mean task vector, shortened by the angles between the models.

        theta = theta_0 + t mean tau_i, t = N cos / (1 + (N-1) cos),
        cos the mean over all pairs

    Jang et al., "Model Stock: All we need is just a few fine-tuned models". Where a denominator is zero,
    the base is kept. A zero task vector has cosine 0 with any other; short ones have their true cosine
    (mergekit shrinks it where the product of the lengths is below 1e-6).
    """
    n = len(tvs)
    if n < 2:
        raise RecipeError(f"models: 'model_stock' takes at least 2 models besides the base, got {n}", "add a fine-tune")
    if not p.filter_wise:
        dots = yield gram(tvs)
        return total(tvs) * (interpolation(dots).item() / n)
    rows = rows_of(tvs, ctx.shape)
    wide = rows.double()
    dots = torch.stack([torch.stack([row_total(one * two) for two in wide]) for one in wide])
    return (total(rows) * (interpolation(dots) / n).float()).reshape(-1)


def interpolation(dots: Tensor) -> Tensor:
    """The paper's t from the dot products [models, models, ...] of the task vectors."""
    n = len(dots)
    lengths = [dots[i, i].sqrt() for i in range(n)]
    products = [(dots[i, j], lengths[i] * lengths[j]) for i, j in itertools.combinations(range(n), 2)]
    cosines = [(dot / length.masked_fill(length == 0, 1)).clamp(-1, 1) for dot, length in products]
    cosine = total(cosines) / len(cosines)
    denominator = 1 + (n - 1) * cosine
    singular = denominator.abs() < 1e-6
    return (n * cosine / denominator.masked_fill(singular, 1)).masked_fill(singular, 0)
