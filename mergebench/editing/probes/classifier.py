"""Logistic regression with an L2 penalty, by scikit-learn, its strength chosen by cross-validation.

The features are centred and all divided by one number, the median of their standard deviations. So the penalty has
about the same strength at any layer, and the direction also holds for the unscaled residual stream. (The median,
because a few features are often hundreds of times larger than the others.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

STRENGTHS = tuple(10.0**power for power in range(-5, 3))  # C, weakest fit first
FOLDS = 5


class Classifier(NamedTuple):
    """A logit `rows @ weight + bias`, above zero for the undesired class."""

    weight: Array  # [width] float64, for unscaled features
    bias: float

    def logits(self, rows: Array) -> Array:
        return rows @ self.weight + self.bias


class Validated(NamedTuple):
    """The cross-validated scores of a layer, at the strength of the least log loss."""

    strength: float
    accuracy: float
    stderr: float
    auc: float  # mean over the folds


def fit(rows: Array, undesired: Array, strength: float) -> Classifier:
    """The classifier that minimises strength * sum of log losses + |weight|^2 / 2, in the scaled features."""
    scaled, mean, scale = _scaled(rows)
    with _alone():
        found = _regression(C=strength, tol=1e-8).fit(scaled, undesired)
    weight = found.coef_[0] / scale
    return Classifier(weight, float(found.intercept_[0] - mean @ weight))


def validate(rows: Array, undesired: Array, seed: int) -> Validated:
    """Stratified cross-validation of every strength; of equal losses, the weaker fit wins."""
    from scipy.special import expit
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold

    folds = min(FOLDS, int(np.bincount(undesired.astype(int)).min()))
    scaled, _, _ = _scaled(rows)
    logits = np.empty((len(STRENGTHS), len(rows)))
    parts = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(scaled, undesired))
    with _alone():
        for known, asked in parts:
            model = _regression(warm_start=True)
            for number, strength in enumerate(STRENGTHS):
                model.set_params(C=strength).fit(scaled[known], undesired[known])
                logits[number, asked] = model.decision_function(scaled[asked])
    best = int(np.argmin([log_loss(undesired, expit(one)) for one in logits]))
    accuracy = right(logits[best], undesired)
    auc = float(np.mean([area(logits[best, asked], undesired[asked]) for _, asked in parts]))
    return Validated(STRENGTHS[best], accuracy, math.sqrt(accuracy * (1 - accuracy) / len(rows)), auc)


def right(logits: Array, undesired: Array) -> float:
    """The share of right answers."""
    return float(np.mean((logits > 0) == undesired))


def area(logits: Array, undesired: Array) -> float:
    """The area under the ROC curve."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(undesired, logits))


def _regression(**more: Any) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=10_000, **more)


def _scaled(rows: Array) -> tuple[Array, Array, float]:
    rows = rows.astype(np.float64)
    mean = rows.mean(0)
    rows -= mean
    scale = float(np.median(rows.std(0))) or 1.0
    return rows / scale, mean, scale


@contextmanager
def _alone() -> Iterator[None]:
    """Run on one thread, so that the bits do not depend on the number of cores, without warnings of slow
    convergence."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings(action="ignore"):
        yield
