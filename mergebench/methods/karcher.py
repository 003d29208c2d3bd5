"""Karcher mean: the point of the sphere nearest to all models, at their mean length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergebench.engine.chunks import total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, Weights, merge_method
from mergebench.engine.statistics import gram
from mergebench.parameters import param

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Params:
    max_iter: int = param(10, "most steps towards the mean", low=0)
    tol: float = param(1e-5, "length of a step, or an angle, that counts as none", above=0)


@merge_method(takes="weights", paper="arXiv:2603.04972", base_counts=True)
def karcher(weights: Weights, p: Params, ctx: Context) -> Passes:
    """The mean of the models' directions along the sphere, at the mean of their lengths.

        theta = mean |theta_i| m,
        m the mean of u_i = theta_i / |theta_i| along the sphere:
        m <- exp_m(mean of log_m(u_i)),
        log_m(u) = (phi / sin phi) (u - cos phi m), phi the angle of u and m

    As in mergekit, with equal weights; a base is one more model. Steps go on until one is shorter than
    `tol`. All of it happens in the models' dot products: the mean is a weighted sum of the models. A model
    opposite to the mean has no direction there, a zero tensor none at all: they take no part in the step
    (mergekit drops any tensor shorter than `tol`).
    """
    dots = (yield gram(weights)).cpu().numpy()
    lengths = np.sqrt(dots.diagonal())
    shares = np.zeros(len(lengths))
    some = lengths > 0
    if some.any():
        cosines = dots[np.ix_(some, some)] / np.outer(lengths[some], lengths[some])
        shares[some] = mean_direction(cosines, p.max_iter, p.tol) / lengths[some] * lengths.mean()
    return total(weights, shares.tolist())


def mean_direction(cosines: Floats, max_iter: int, tol: float) -> Floats:
    """The Karcher mean as a weighted sum of unit vectors, which are known by their cosines."""

    def norm(vector: Floats) -> float:
        return math.sqrt(max(float(vector @ cosines @ vector), 0.0))

    count = len(cosines)
    mean = np.full(count, 1 / count)
    mean = np.eye(count)[0] if norm(mean) < tol else mean / norm(mean)
    for _ in range(max_iter):
        cosine = (cosines @ mean).clip(-1, 1)
        angle = np.arccos(cosine)
        moving = (angle >= tol) & (np.pi - angle >= tol)
        pull = np.where(moving, angle / np.sin(np.where(moving, angle, 1)), 0.0) / count
        step = pull - (pull @ cosine) * mean
        length = norm(step)
        if length < tol:
            break
        mean = np.cos(length) * mean + np.sin(length) / length * step
        mean /= norm(mean)
    return mean
