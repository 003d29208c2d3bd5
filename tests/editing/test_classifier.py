"""The classifier against what defines it: a zero gradient, scikit-learn's own loops, and the scales it must not see."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from threadpoolctl import threadpool_limits

from mergebench.editing.probes.classifier import STRENGTHS, Array, area, fit, right, validate


def rows(count: int = 90, width: int = 24, shift: float = 0.7, seed: int = 0) -> tuple[Array, Array]:
    """Two clouds of unlike spread, off the origin, one feature a hundred times the others."""
    random = np.random.default_rng(seed)
    y = random.random(count) < 0.4
    x = random.normal(size=(count, width)) * random.uniform(0.5, 2, width) + random.normal(size=width)
    x += shift * y[:, None] * random.normal(size=width)
    x[:, 3] *= 100
    return x.astype(np.float32), y


@pytest.mark.parametrize("strength", [1e-4, 0.1, 10])
def test_the_gradient_is_zero(strength: float) -> None:
    """d/dw [C sum(log loss) + |s w|^2 / 2] where features are divided by s."""
    x, y = rows()
    found = fit(x, y, strength)
    scale = np.median(x.astype(float).std(0))
    centred = (x - x.mean(0, dtype=float)) / scale
    error = expit(found.logits(x.astype(float))) - y
    assert abs(error.sum()) < 1e-4 * len(y)
    gradient = strength * centred.T @ error + found.weight * scale
    at_zero = strength * centred.T @ (y.mean() - y)
    assert np.abs(gradient).max() < 1e-5 * np.abs(at_zero).max()


def test_equal_to_scikit_learn() -> None:
    """One scale for all features is another C: no scaling at all, C divided by the scale squared."""
    x, y = rows()
    x[:, 3] /= 100
    scale = np.median(x.astype(float).std(0))
    plain = LogisticRegression(C=0.1 / scale**2, tol=1e-10, max_iter=100_000).fit(x.astype(float), y)
    found = fit(x, y, 0.1)
    assert np.allclose(found.weight, plain.coef_[0], atol=1e-5)
    assert np.isclose(found.bias, plain.intercept_[0], atol=1e-5)


def test_units_and_origin_do_not_matter() -> None:
    x, y = rows()
    one, other = fit(x, y, 0.1), fit(8 * x + 16, y, 0.1)
    assert np.allclose(other.weight * 8, one.weight, atol=1e-4 * np.abs(one.weight).max())
    assert np.allclose(other.logits(8 * x + 16), one.logits(x), atol=1e-3)
    first, second = validate(x, y, 3), validate(8 * x, y, 3)
    assert first == pytest.approx(second)


@pytest.mark.parametrize("shift", [0.15, 0.7])
def test_validation(shift: float) -> None:
    """The strength of least log loss, and what it gives, by scikit-learn's own cross-validation."""
    x, y = rows(shift=shift)
    x[:, 3] /= 100
    found = validate(x, y, seed=5)
    folds = StratifiedKFold(5, shuffle=True, random_state=5)
    centred = x.astype(float) - x.mean(0, dtype=float)
    scaled = centred / np.median(centred.std(0))
    logits = {}
    for c in STRENGTHS:
        model = LogisticRegression(C=c, max_iter=10_000)
        with threadpool_limits(1):
            logits[c] = cross_val_predict(model, scaled, y, cv=folds, method="decision_function")
    best = min(STRENGTHS, key=lambda c: log_loss(y, expit(logits[c])))
    assert found.strength == best
    assert 0.5 < found.accuracy < 1
    assert found.accuracy == pytest.approx(np.mean((logits[best] > 0) == y), abs=1 / len(y))
    assert found.stderr == pytest.approx(np.sqrt(found.accuracy * (1 - found.accuracy) / len(y)))
    parts = [roc_auc_score(y[part], logits[best][part]) for _, part in folds.split(x, y)]
    assert found.auc == pytest.approx(np.mean(parts), abs=0.01)


def test_few_of_a_class_and_nothing_to_learn() -> None:
    x, y = rows(30)
    y[:] = False
    y[:3] = True
    assert 0 < validate(x, y, 0).auc < 1  # three folds, each with one of them
    same = np.ones((20, 4), np.float32)
    found = fit(same, np.arange(20) % 2 == 0, 1.0)
    assert not found.weight.any()


def test_what_is_counted() -> None:
    logits, y = np.array([-2.0, -1.0, 0.5, 3.0]), np.array([False, True, False, True])
    assert right(logits, y) == 0.5
    assert area(logits, y) == 0.75  # three of four pairs in order
