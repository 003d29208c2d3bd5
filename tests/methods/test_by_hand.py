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

from mergebench.errors import RecipeError
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


def crumbs_by_hand(row: Sequence[float], density: float, gamma: float) -> list[float]:
    """Sort by magnitude, take int(density d) from below the int(gamma d) largest, and what equals their ends."""
    if density == 1:
        return list(row)
    kept, top = int(density * len(row)), int(gamma * len(row))
    first = max(len(row) - kept - top, 0)
    between = sorted(abs(value) for value in row)[first : first + kept]
    return [value if kept and between[0] <= abs(value) <= between[-1] else 0.0 for value in row]


@settings(max_examples=200, deadline=None)
@given(task_vectors(), st.data())
def test_breadcrumbs(rows: Rows, data: st.DataObject) -> None:
    weights, densities = each(data, WEIGHTS, rows), each(data, DENSITIES, rows)
    gammas = each(data, st.sampled_from([0.0, 0.01, 0.1, 0.3, 1.0]), rows)
    values = {"density": densities, "gamma": gammas, "weight": weights, "lambda": 0.5}
    tvs = torch.tensor(rows)

    trimmed = [crumbs_by_hand(*one) for one in zip(rows, densities, gammas, strict=True)]
    added = [sum(w * v for w, v in zip(weights, column, strict=True)) for column in zip(*trimmed, strict=True)]
    check(whole("breadcrumbs", tvs, **values), [value / 2 for value in added])
    if sum(weights) != 0:
        check(whole("breadcrumbs", tvs, **values, normalize=True), [value / 2 / sum(weights) for value in added])
    for normalize in (False, True):
        elected = elect_by_hand(trimmed, weights, normalize)
        check(whole("breadcrumbs_ties", tvs, **values, normalize=normalize), [value / 2 for value in elected])


@settings(max_examples=200, deadline=None)
@given(task_vectors(), st.sampled_from([0.1, 0.3, 0.5, 0.75, 1.0]))
def test_sce(rows: Rows, topk: float) -> None:
    columns = list(zip(*rows, strict=True))
    variances = [sum((a - b) ** 2 for a in column for b in column) for column in columns]
    kept = int(sum(variance > 0 for variance in variances) * topk)
    threshold = sorted(variances, reverse=True)[kept - 1] if kept else math.inf
    selected = [topk == 1 or variance >= threshold for variance in variances]
    squares = [sum(value**2 for value, keep in zip(row, selected, strict=True) if keep) for row in rows]
    weights = [square / sum(squares) if sum(squares) else 1 / len(rows) for square in squares]

    expected = []
    for column, keep in zip(columns, selected, strict=True):
        sign = 1 if sum(column) >= 0 else -1
        agree = [(w * v, w) for w, v in zip(weights, column, strict=True) if keep and v * sign > 0]
        expected.append(sum(v for v, _ in agree) / sum(w for _, w in agree) if agree else 0.0)
    check(whole("sce", torch.tensor(rows), select_topk=topk), expected)


@settings(max_examples=200, deadline=None)
@given(task_vectors(), st.sampled_from([0.0, 1.0, 2.5]), st.sampled_from([0.2, 1.0, 5.0]))
def test_ram(rows: Rows, epsilon: float, alpha: float) -> None:
    touched = [[value if abs(value) > epsilon else 0.0 for value in row] for row in rows]
    columns = list(zip(*touched, strict=True))
    counts = [sum(value != 0 for value in column) for column in columns]
    averaged = [sum(column) / max(count, 1) for column, count in zip(columns, counts, strict=True)]
    check(whole("ram", torch.tensor(rows), epsilon=epsilon), averaged)

    growth = []
    for row in touched:
        own = sum(value != 0 and count == 1 for value, count in zip(row, counts, strict=True))
        shared = sum(value != 0 and count > 1 for value, count in zip(row, counts, strict=True))
        growth.append(1 + 0.1 * min(shared / max(own, 1e-9), alpha))
    scaled = [sum(factor * value for factor, value in zip(growth, column, strict=True)) for column in columns]
    expected = [own if count == 1 else mean for own, count, mean in zip(scaled, counts, averaged, strict=True)]
    check(whole("ramplus_tl", torch.tensor(rows), epsilon=epsilon, r=0.1, alpha=alpha), expected)


@settings(max_examples=100, deadline=None)
@given(task_vectors())
def test_magmax(rows: Rows) -> None:
    expected = [max(column, key=lambda value: (abs(value), value)) for column in zip(*rows, strict=True)]
    check(whole("magmax", torch.tensor(rows), **{"lambda": 0.5}), [value / 2 for value in expected])


@settings(max_examples=200, deadline=None)
@given(task_vectors(), st.data())
def test_tall_masks(rows: Rows, data: st.DataObject) -> None:
    limits = each(data, st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), rows)
    k = data.draw(st.integers(0, len(rows)))
    columns = list(zip(*rows, strict=True))
    masks = [
        [abs(value) >= limit * abs(sum(column) - value) for value, limit in zip(column, limits, strict=True)]
        for column in columns
    ]
    tvs = torch.tensor(rows)

    consensus = [sum(column) * (sum(mask) >= k) for column, mask in zip(columns, masks, strict=True)]
    found = whole("consensus_ta", tvs, tall_lambda=limits, k=k, **{"lambda": 0.5})
    check(found, [value / 2 for value in consensus])
    for task, limit in enumerate(limits):
        expected = [sum(column) * mask[task] for column, mask in zip(columns, masks, strict=True)]
        check(whole("tall_mask", tvs, task=task + 1, tall_lambda=limit), expected)


@settings(max_examples=100, deadline=None)
@given(task_vectors(), st.data())
def test_localize_stitch(rows: Rows, data: st.DataObject) -> None:
    densities = each(data, DENSITIES, rows)
    localized = [trim_by_hand(row, density) for row, density in zip(rows, densities, strict=True)]
    stitched = []
    for column in zip(*localized, strict=True):
        count = sum(value != 0 for value in column)
        stitched.append(sum(column) / max(count, 1))
    check(whole("localize_stitch", torch.tensor(rows), "model", density=densities), stitched)


@pytest.mark.parametrize(("name", "values"), [("consensus_ta", {"k": 3}), ("tall_mask", {"task": 3})])
def test_more_masks_or_tasks_than_models_are_refused(name: str, values: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=r"3 .* 2 models"):
        whole(name, torch.ones(2, 5), **values)


TASK_VECTOR_METHODS = [
    "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear",
    "sce", "ram", "ramplus_tl", "magmax", "consensus_ta", "tall_mask", "localize_stitch",
]  # fmt: skip
ALL_KEPT = {"ram": {"epsilon": 0}, "ramplus_tl": {"epsilon": 0}, "consensus_ta": {"k": 1}, "tall_mask": {"task": 1}}
ALL_KEPT["localize_stitch"] = {"density": 1.0}


@pytest.mark.parametrize("name", TASK_VECTOR_METHODS)
def test_one_model_at_weight_and_density_one_is_itself(name: str) -> None:
    tvs = torch.randn(1, 500, generator=torch.Generator().manual_seed(1))

    assert torch.equal(tvs[0], whole(name, tvs, **ALL_KEPT.get(name, {})))


@pytest.mark.parametrize("name", ["breadcrumbs", "dare_linear", "della_linear"])
def test_density_one_is_the_plain_sum(name: str) -> None:
    tvs = torch.randn(3, 500, generator=torch.Generator().manual_seed(4))

    assert torch.equal(
        whole("task_arithmetic", tvs, weight=(1.0, 0.5, -2.0)), whole(name, tvs, weight=(1.0, 0.5, -2.0))
    )


@pytest.mark.parametrize("name", ["linear", "ties", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della"])
def test_equal_models_merge_into_themselves(name: str) -> None:
    row = torch.randn(500, generator=torch.Generator().manual_seed(2))

    torch.testing.assert_close(whole(name, row.repeat(4, 1), normalize=True), row)


def test_magmax_of_no_change_has_no_sign() -> None:
    """torch.maximum takes either of two zeros, by their place in the chunk."""
    assert not torch.signbit(whole("magmax", torch.zeros(2, 33))).any()


@pytest.mark.parametrize("name", ["sce", "ram", "ramplus_tl", "magmax", "localize_stitch"])
def test_equal_models_merge_into_themselves_without_weights(name: str) -> None:
    row = torch.randn(500, generator=torch.Generator().manual_seed(2))

    torch.testing.assert_close(whole(name, row.repeat(4, 1), **ALL_KEPT.get(name, {})), row)


SOME_KEPT = {
    "ties": {"density": 0.4}, "breadcrumbs": {"density": 0.4, "gamma": 0.1}, "breadcrumbs_ties": {"density": 0.4},
    "sce": {"select_topk": 0.4}, "ram": {"epsilon": 5}, "ramplus_tl": {"epsilon": 5}, "consensus_ta": {"k": 3},
    "tall_mask": {"task": 1}, "localize_stitch": {"density": 0.2}, "della": {"density": 0.5}, "slerp": {"t": 0.5},
    "della_linear": {"density": 0.5}, "dare_linear": {"density": 0.5}, "dare_ties": {"density": 0.5},
}  # fmt: skip
SYMMETRIC = [
    "linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "sce", "ram", "ramplus_tl", "magmax",
    "consensus_ta", "localize_stitch",
]  # fmt: skip


@pytest.mark.parametrize("name", SYMMETRIC)
def test_the_order_of_models_does_not_matter(name: str) -> None:
    rows = torch.randint(-9, 10, (4, 500), generator=torch.Generator().manual_seed(3)).float()
    more = SOME_KEPT.get(name, {})

    one, other = whole(name, rows, **more), whole(name, rows[[3, 1, 0, 2]], **more)
    torch.testing.assert_close(one, other, rtol=0, atol=0 if name not in ("sce", "ramplus_tl") else 2e-6)


@pytest.mark.parametrize("elements", [1, 2, 50])
@pytest.mark.parametrize("name", sorted(set(TASK_VECTOR_METHODS)))
def test_task_vectors_of_zero_and_of_one_element_are_merged(name: str, elements: int) -> None:
    more, tvs = SOME_KEPT.get(name, {}), torch.ones(3, elements)

    assert torch.isfinite(whole(name, tvs, **more)).all()
    assert not whole(name, torch.zeros(3, elements), **more).any()
