"""The methods against their formulas, computed element by element in Python, and against their identities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.methods.whole import context_of, whole

Rows = list[list[float]]

# small integers: sums are exact in float32, and equal magnitudes and even votes are common
WEIGHTS = st.sampled_from([1.0, 2.0, 0.5, -1.0])
DENSITIES = st.sampled_from([0.1, 0.3, 0.5, 0.75, 1.0])


@st.composite
def task_vectors(draw: st.DrawFn) -> Rows:
    models, elements = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    row = st.lists(st.integers(-4, 4).map(float), min_size=elements, max_size=elements)
    return draw(st.lists(row, min_size=models, max_size=models))


def each(draw: st.DataObject, strategy: st.SearchStrategy[float], rows: Rows) -> tuple[float, ...]:
    return tuple(draw.draw(strategy) for _ in rows)


def trim_by_hand(row: Sequence[float], density: float) -> list[float]:
    """Keep the k largest magnitudes and whatever equals the smallest of them."""
    kept = max(int(len(row) * density), 1)
    threshold = sorted((abs(value) for value in row), reverse=True)[kept - 1]
    return [value if abs(value) >= threshold else 0.0 for value in row]


def elect_by_hand(rows: Rows, weights: Sequence[float], normalize: bool) -> list[float]:
    merged = []
    for column in zip(*rows, strict=True):
        votes = [weight * value for weight, value in zip(weights, column, strict=True)]
        sign = 1 if sum(votes) >= 0 else -1
        agree = [(vote, weight) for vote, weight in zip(votes, weights, strict=True) if vote * sign > 0]
        mass = sum(weight for _, weight in agree)
        value = sum(vote for vote, _ in agree)
        merged.append(value / mass if normalize and mass != 0 else value)
    return merged


def check(found: Tensor, expected: Sequence[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(task_vectors(), st.data())
def test_ties(rows: Rows, data: st.DataObject) -> None:
    weights, densities = each(data, WEIGHTS, rows), each(data, DENSITIES, rows)
    normalize, factor = data.draw(st.booleans()), data.draw(st.sampled_from([1.0, 0.5]))

    found = whole(
        "ties", torch.tensor(rows), density=densities, weight=weights, normalize=normalize, **{"lambda": factor}
    )

    trimmed = [trim_by_hand(row, density) for row, density in zip(rows, densities, strict=True)]
    check(found, [value * factor for value in elect_by_hand(trimmed, weights, normalize)])


@settings(max_examples=100, deadline=None)
@given(task_vectors(), st.data())
def test_dare(rows: Rows, data: st.DataObject) -> None:
    """Given what was drawn: a mask of the element, the rest divided by the density, then added or elected."""
    weights, densities = each(data, WEIGHTS, rows), each(data, DENSITIES, rows)
    rescale, normalize = data.draw(st.booleans()), data.draw(st.booleans())
    tvs = torch.tensor(rows)
    drawn = context_of(tvs).bernoulli(densities).tolist()
    kept = [
        [value * keep / (density if rescale else 1) for value, keep in zip(row, mask, strict=True)]
        for row, mask, density in zip(rows, drawn, densities, strict=True)
    ]
    more = {"density": densities, "weight": weights, "rescale": rescale}

    added = [sum(w * v for w, v in zip(weights, column, strict=True)) for column in zip(*kept, strict=True)]
    check(whole("dare_linear", tvs, **more), added)
    if sum(weights) != 0:
        check(whole("dare_linear", tvs, **more, normalize=True), [value / sum(weights) for value in added])
    if all(weight > 0 for weight in weights) and all(density in (0.5, 1.0) for density in densities):  # exact votes
        check(whole("dare_ties", tvs, **more, normalize=normalize), elect_by_hand(kept, weights, normalize))


@settings(max_examples=100, deadline=None)
@given(task_vectors(), st.data())
def test_sums(rows: Rows, data: st.DataObject) -> None:
    weights = each(data, WEIGHTS, rows)
    added = [sum(w * v for w, v in zip(weights, column, strict=True)) for column in zip(*rows, strict=True)]
    tvs = torch.tensor(rows)

    check(whole("linear", tvs, weight=weights, normalize=False), added)
    check(whole("task_arithmetic", tvs, weight=weights, **{"lambda": 0.5}), [value / 2 for value in added])
    if sum(weights) != 0:
        mean = [value / sum(weights) for value in added]
        check(whole("linear", tvs, weight=weights), mean)
        check(whole("task_arithmetic", tvs, weight=weights, normalize=True), mean)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_slerp(t: float) -> None:
    """On the great circle, in float64: the angle to each end is its share of the whole angle."""
    generator = np.random.default_rng(0)
    one = generator.normal(size=50)
    one /= np.linalg.norm(one)
    other = generator.normal(size=50)
    other /= np.linalg.norm(other)
    found = whole("slerp", torch.tensor(np.stack([one, other]), dtype=torch.float32), t=t).double().numpy()

    angle = math.acos(one @ other)
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    assert math.acos(min(found @ one, 1)) == pytest.approx(t * angle, abs=1e-3)
    assert math.acos(min(found @ other, 1)) == pytest.approx((1 - t) * angle, abs=1e-3)


def test_slerp_at_its_ends_and_along_a_line() -> None:
    rows = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))

    assert torch.equal(whole("slerp", rows, t=0.0), rows[0])
    assert torch.equal(whole("slerp", rows, t=1.0), rows[1])
    parallel = torch.stack([rows[0], 3 * rows[0]])
    torch.testing.assert_close(whole("slerp", parallel, t=0.25), 1.5 * rows[0])
    zero = torch.stack([rows[0], torch.zeros(40)])
    torch.testing.assert_close(whole("slerp", zero, t=0.5), rows[0] * math.sqrt(0.5))
    opposite = torch.stack([rows[0], -rows[0]])
    torch.testing.assert_close(whole("slerp", opposite, t=0.25), 0.5 * rows[0])


TASK_VECTOR_METHODS = ["task_arithmetic", "ties", "dare_linear", "dare_ties"]


@pytest.mark.parametrize("name", TASK_VECTOR_METHODS)
def test_one_model_at_weight_and_density_one_is_itself(name: str) -> None:
    tvs = torch.randn(1, 500, generator=torch.Generator().manual_seed(1))

    assert torch.equal(tvs[0], whole(name, tvs))


@pytest.mark.parametrize("name", ["linear", "ties", "dare_ties"])
def test_equal_models_merge_into_themselves(name: str) -> None:
    row = torch.randn(500, generator=torch.Generator().manual_seed(2))

    torch.testing.assert_close(whole(name, row.repeat(4, 1), normalize=True), row)


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties"])
def test_the_order_of_models_does_not_matter(name: str) -> None:
    rows = torch.randint(-9, 10, (4, 500), generator=torch.Generator().manual_seed(3)).float()
    more = {"density": 0.4} if name == "ties" else {}

    assert torch.equal(whole(name, rows, **more), whole(name, rows[[3, 1, 0, 2]], **more))
