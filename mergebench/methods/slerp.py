"""Spherical linear interpolation between two models."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mergebench.engine.chunks import total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, Weights, merge_method
from mergebench.engine.statistics import gram
from mergebench.parameters import param

ORDER = "t counts from the first model to the second"
PARALLEL = 0.9995  # cosine above which two tensors are interpolated linearly


@dataclass(frozen=True)
class Params:
    t: float = param(help="place between the base (0) and the other model (1)", low=0, high=1)


@merge_method(takes="weights", paper="doi:10.1145/325334.325242", models=2, exempt={"order": ORDER})
def slerp(weights: Weights, p: Params, ctx: Context) -> Passes:
    """Interpolate along the arc between two models, each tensor (or the model) as one vector.

        theta = sin((1-t) phi) / sin(phi) theta_0 + sin(t phi) / sin(phi) theta_1,
        phi their angle

    Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985). Nearly parallel tensors are
    interpolated linearly. The base is the t = 0 end wherever it is listed.
    """
    dots = yield gram(weights)
    lengths = [math.sqrt(dots[i, i]) for i in range(2)]
    # a zero tensor has no direction: it counts as orthogonal, as in mergekit
    cosine = float(dots[0, 1]) / math.prod(length if length > 1e-8 else 1.0 for length in lengths)
    if abs(cosine) > PARALLEL:
        return total(weights, (1 - p.t, p.t))
    angle = math.acos(cosine)
    return total(weights, [math.sin(share * angle) / math.sin(angle) for share in (1 - p.t, p.t)])
