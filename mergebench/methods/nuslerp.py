"""NuSLERP: spherical interpolation of two models, or of their task vectors, whole or row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergebench.engine.chunks import row_total, rows_of, total
from mergebench.engine.context import Context
from mergebench.engine.method import Cut, Passes, TaskVectors, Tensor, merge_method
from mergebench.engine.statistics import gram
from mergebench.parameters import PerModel, param

PARALLEL = 1e-7  # sin^2 of the angle below which vectors are interpolated linearly: float32 resolves no less


@dataclass(frozen=True)
class Params:
    weight: PerModel = param(1.0, "weight of the model; their ratio is the place between the two", per_model=True)
    nuslerp_flatten: bool = param(True, "take each tensor as one vector")
    nuslerp_row_wise: bool = param(False, "unflattened: vectors along the first dimension, not the last")


def piece(p: Params) -> Cut:
    """The smallest piece a tensor may be cut into."""
    return "element" if p.nuslerp_flatten else "tensor" if p.nuslerp_row_wise else "row"


@merge_method(
    takes="task_vectors", keeps_base=True, paper="doi:10.1145/325334.325242", cut=piece, models=2, optional_base=True
)
def nuslerp(values: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Interpolate along the arc between two models (with a base: between their task vectors).

        theta = sin((1-t) phi) / sin(phi) x_1 + sin(t phi) / sin(phi) x_2,
        t = w_2 / (w_1 + w_2)
        x_i = theta_i; with a base x_i = tau_i, and theta_0 is added;
        phi is the angle of x_1 and x_2

    Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985), with t = 1/2 where the weights
    add up to zero. Parallel and opposite vectors are interpolated linearly; a zero vector counts as
    orthogonal. Unflattened, each vector along the last dimension has an arc of its own; `nuslerp_row_wise`
    takes those along the first dimension, the columns (the name is mergekit's).
    """
    both = sum(p.weight)
    t = 0.5 if abs(both) < 1e-6 else p.weight[1] / both
    if p.nuslerp_flatten:
        dots = yield gram(values)
        return total(values, [share.item() for share in arc(dots[0, 0], dots[0, 1], dots[1, 1], t)])
    if p.nuslerp_row_wise:
        vectors = values.reshape(2, *(ctx.shape or (1,))).transpose(1, -1)
    else:
        vectors = rows_of(values, ctx.shape)
    one, two = vectors.double()
    shares = arc(row_total(one * one), row_total(one * two), row_total(two * two), t)
    merged = total([vector * share.float() for vector, share in zip(vectors, shares, strict=True)])
    return (merged.transpose(0, -1) if p.nuslerp_row_wise else merged).reshape(-1)


def arc(one: Tensor, cross: Tensor, two: Tensor, t: float) -> list[Tensor]:
    """sin((1-t)w)/sin(w) and sin(tw)/sin(w), w the angle between vectors of these dot products (float64)."""
    lengths = one.sqrt() * two.sqrt()
    cosine = (cross / lengths.masked_fill(lengths == 0, 1)).clamp(-1, 1)
    straight = 1 - cosine * cosine <= PARALLEL
    angle = torch.acos(cosine)
    return [torch.where(straight, share, (angle * share).sin() / angle.sin()) for share in (1 - t, t)]
