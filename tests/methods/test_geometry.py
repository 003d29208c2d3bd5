"""The methods that work with lengths and angles, against their formulas computed in Python, and their identities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mergebench.errors import RecipeError, RunError
from tests.methods.test_by_hand import WEIGHTS, Rows, check, each, task_vectors
from tests.methods.whole import whole

Vector = Sequence[float]


def dot(one: Vector, two: Vector) -> float:
    return math.fsum(a * b for a, b in zip(one, two, strict=True))


def length(vector: Vector) -> float:
    return math.sqrt(dot(vector, vector))


def combined(shares: Vector, rows: Sequence[Vector]) -> list[float]:
    return [
        math.fsum(share * value for share, value in zip(shares, column, strict=True))
        for column in zip(*rows, strict=True)
    ]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- nuslerp


def arc_by_hand(one: Vector, two: Vector, t: float) -> list[float]:
    cosine = max(min(dot(one, two) / (max(length(one), 1e-7) * max(length(two), 1e-7)), 1.0), -1.0)
    if 1 - cosine * cosine < 1e-7:
        return combined([1 - t, t], [one, two])
    angle = math.acos(cosine)
    return combined([math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)], [one, two])


@st.composite
def matrices(draw: st.DrawFn) -> NDArray[np.float64]:
    """Two matrices of small integers: parallel, opposite and zero rows are common."""
    shape = (2, draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    size = math.prod(shape)
    return np.reshape(draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size)), shape).astype(np.float64)


@settings(max_examples=200, deadline=None)
@given(matrices(), st.sampled_from([(1.0, 1.0), (1.0, 3.0), (2.0, 0.0), (1.0, -1.0), (-1.0, 3.0)]))
def test_nuslerp(pair: NDArray[np.float64], weights: tuple[float, float]) -> None:
    """The tensors as one vector, each row as one, each column as one."""
    t = 0.5 if sum(weights) == 0 else weights[1] / sum(weights)
    shape, flat = pair.shape[1:], torch.tensor(pair, dtype=torch.float32).reshape(2, -1)
    one, two = pair

    def close(found: Tensor, expected: NDArray[np.float64]) -> None:
        wanted = torch.tensor(expected.ravel(), dtype=torch.float32)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-4)  # nearly opposite rows have large shares

    close(whole("nuslerp", flat, weight=weights), np.array(arc_by_hand(one.ravel(), two.ravel(), t)))
    rows = np.array([arc_by_hand(a, b, t) for a, b in zip(one, two, strict=True)])
    close(whole("nuslerp", flat, shape=shape, weight=weights, nuslerp_flatten=False), rows)
    columns = np.array([arc_by_hand(a, b, t) for a, b in zip(one.T, two.T, strict=True)]).T
    close(whole("nuslerp", flat, shape=shape, weight=weights, nuslerp_flatten=False, nuslerp_row_wise=True), columns)


def test_nuslerp_in_three_dimensions() -> None:
    """Rows are the last dimension, columns the first."""
    one, two = pair = noise(2, 3, 4, 5).double()
    more = {"shape": (3, 4, 5), "weight": (1.0, 3.0), "nuslerp_flatten": False}
    flat = pair.float().reshape(2, -1)

    rows = whole("nuslerp", flat, **more).reshape(3, 4, 5)
    check(rows[2, 1], arc_by_hand(one[2, 1].tolist(), two[2, 1].tolist(), 0.75))
    columns = whole("nuslerp", flat, **more, nuslerp_row_wise=True).reshape(3, 4, 5)
    check(columns[:, 1, 2], arc_by_hand(one[:, 1, 2].tolist(), two[:, 1, 2].tolist(), 0.75))


# -- multislerp


def multislerp_by_hand(rows: Rows, weights: Vector) -> list[float] | None:
    """As it was published, with the step in the tangent space; None where the directions cancel."""
    units = [[value / (length(row) or 1) for value in row] for row in rows]
    mean = combined(weights, units)
    if length(mean) < 1e-6:
        return None
    assume(length(mean) > 0.1)  # nearer to none, float32's rounding of the shares is blown up
    mean = [value / length(mean) for value in mean]
    tangents = [[u - dot(unit, mean) * m for u, m in zip(unit, mean, strict=True)] for unit in units]
    step = combined(weights, tangents)
    ahead = length(step) + 1e-8
    size = math.fsum(weight * length(row) for weight, row in zip(weights, rows, strict=True))
    return combined([size * math.cos(ahead), size * math.sin(ahead) / ahead], [mean, step])


@settings(max_examples=200, deadline=None)
@given(task_vectors(), st.data())
def test_multislerp(rows: Rows, data: st.DataObject) -> None:
    weights = each(data, WEIGHTS, rows)
    normalize = data.draw(st.booleans())
    assume(not normalize or sum(weights) != 0)
    scaled = [weight / sum(weights) for weight in weights] if normalize else weights
    tvs = torch.tensor(rows)
    expected = multislerp_by_hand(rows, scaled)
    more = {"weight": weights, "normalize_weights": normalize}

    if expected is None and len(rows) > 2 and any(map(any, rows)):
        with pytest.raises(RunError, match="w: the directions of the models cancel"):
            whole("multislerp", tvs, **more)
        return
    expected = combined(scaled, rows) if expected is None else expected
    torch.testing.assert_close(whole("multislerp", tvs, **more), torch.tensor(expected), rtol=1e-5, atol=3e-5)


def test_multislerp_refuses_what_has_no_direction() -> None:
    rows = noise(3, 50)
    rows[2] = -rows[0] / rows[0].norm() - rows[1] / rows[1].norm()
    norm = float(rows[2].norm())

    with pytest.raises(RunError, match="w: the directions of the models cancel") as caught:
        whole("multislerp", rows, weight=(1.0, 1.0, norm))
    assert caught.value.hint == "use other weights, or exclude the tensor"
    with pytest.raises(RunError, match="the models: the directions of the models cancel"):
        whole("multislerp", rows, "model", weight=(1.0, 1.0, norm))
    with pytest.raises(RecipeError, match="the weights add up to zero"):
        whole("multislerp", rows, weight=(1.0, 1.0, -2.0))


# -- karcher


@pytest.mark.parametrize("models", [2, 3, 5])
def test_karcher(models: int) -> None:
    """What defines the mean: the directions to all models add up to nothing there; its length is their mean."""
    rows = noise(models, 30, seed=models) + noise(30) * 2
    found = whole("karcher", rows, max_iter=100, tol=1e-9).double()

    units = [row / row.norm() for row in rows.double()]
    mean = found / found.norm()
    angles = [math.acos(float(unit @ mean)) for unit in units]
    pull = sum(angle / math.sin(angle) * (unit - unit @ mean * mean) for angle, unit in zip(angles, units, strict=True))
    assert float(torch.as_tensor(pull).norm()) < 1e-6
    assert float(found.norm()) == pytest.approx(float(rows.double().norm(dim=1).mean()), rel=1e-6)
    assert min(angles) > 0.1


def test_karcher_takes_no_more_steps_than_it_may() -> None:
    rows = noise(3, 6) + 0.5
    units = rows / rows.norm(dim=1, keepdim=True)
    start = units.sum(0) / units.sum(0).norm() * rows.norm(dim=1).mean()
    one, two, found = (whole("karcher", rows, max_iter=steps) for steps in (1, 2, 10))

    torch.testing.assert_close(whole("karcher", rows, max_iter=0), start)
    torch.testing.assert_close(whole("karcher", rows, tol=0.3), start)
    assert (start - found).norm() > 4 * (one - found).norm() > 16 * (two - found).norm() > 1e-6


def test_karcher_of_two_is_the_middle_of_the_arc() -> None:
    rows = noise(2, 40)
    middle = torch.tensor(arc_by_hand(*(row / row.norm() for row in rows.double()), 0.5))

    torch.testing.assert_close(whole("karcher", rows), (middle * rows.norm(dim=1).mean()).float())


def test_karcher_leaves_out_what_has_no_direction() -> None:
    """A zero tensor counts with its length only; a tensor of any length but zero has its direction."""
    rows = noise(2, 40)
    with_zero = torch.cat([rows, torch.zeros(1, 40)])
    torch.testing.assert_close(whole("karcher", with_zero), whole("karcher", rows) * 2 / 3)
    torch.testing.assert_close(whole("karcher", rows * 1e-9), whole("karcher", rows) * 1e-9, rtol=1e-6, atol=0)
    opposite = torch.stack([rows[0], -rows[0]])
    torch.testing.assert_close(whole("karcher", opposite), rows[0])


# -- model_stock


def stock_by_hand(rows: Sequence[Vector]) -> list[float]:
    n = len(rows)
    cosines = []
    for i, one in enumerate(rows):
        for two in rows[i + 1 :]:
            lengths = length(one) * length(two)
            cosines.append(dot(one, two) / lengths if lengths else 0.0)
    cosine = sum(cosines) / len(cosines)
    denominator = 1 + (n - 1) * cosine
    t = 0.0 if abs(denominator) < 1e-6 else n * cosine / denominator
    return combined([t / n] * n, rows)


@settings(max_examples=200, deadline=None)
@given(task_vectors())
def test_model_stock(rows: Rows) -> None:
    assume(len(rows) > 1)
    found = whole("model_stock", torch.tensor(rows))

    torch.testing.assert_close(found, torch.tensor(stock_by_hand(rows), dtype=torch.float32), rtol=1e-5, atol=1e-5)


def test_model_stock_by_rows() -> None:
    tvs = noise(3, 4, 5) * 0.01 + noise(4, 5, seed=1) * 0.01
    tvs[1, 2] = 0
    tvs[:, 3] *= 1e-6  # lengths do not matter

    found = whole("model_stock", tvs.reshape(3, -1), shape=(4, 5), filter_wise=True).reshape(4, 5)

    for row, expected in enumerate(tvs.double().transpose(0, 1).tolist()):
        torch.testing.assert_close(found[row], torch.tensor(stock_by_hand(expected)), rtol=1e-5, atol=0)


def test_model_stock_needs_two_models() -> None:
    with pytest.raises(RecipeError, match="at least 2 models besides the base, got 1"):
        whole("model_stock", noise(1, 5))


# -- nearswap, arcee_fusion, passthrough


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-8, 8).map(float), min_size=1, max_size=12), st.sampled_from([0.0, 0.5, 2.0, 3.5, 20.0]))
def test_nearswap(row: list[float], t: float) -> None:
    """The published weights: min(t / |difference|, 1) of the other model."""
    check(whole("nearswap", torch.tensor([row]), t=t), [value * min(t / max(abs(value), 1e-6), 1) for value in row])


def fusion_by_hand(base: Rows, other: Rows) -> list[float]:
    importance = []
    for a, b in zip(base, other, strict=True):
        p = [math.exp(value) / math.fsum(map(math.exp, b)) + 1e-8 for value in b]
        q = [math.exp(value) / math.fsum(map(math.exp, a)) + 1e-8 for value in a]
        divergence = math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        importance += [abs(y - x) * divergence for x, y in zip(a, b, strict=True)]
    ordered, last = sorted(importance), len(importance) - 1
    quartiles = [ordered[int(share * last)] for share in (0.25, 0.5, 0.75)]
    threshold = quartiles[1] + 1.5 * (quartiles[2] - quartiles[0])
    pairs = [pair for a, b in zip(base, other, strict=True) for pair in zip(a, b, strict=True)]
    return [y if i >= threshold else x for i, (x, y) in zip(importance, pairs, strict=True)]


@pytest.mark.parametrize("shape", [(12, 7), (1, 50), (3, 1), (1, 1)])
@pytest.mark.parametrize("step", [1.0, 1e-3])
def test_arcee_fusion(shape: tuple[int, int], step: float) -> None:
    base = noise(*shape)
    other = base + step * noise(*shape, seed=1)
    by_hand = fusion_by_hand(base.double().tolist(), other.double().tolist())

    found = whole("arcee_fusion", torch.stack([base, other]).reshape(2, -1), shape=shape)

    check(found, by_hand)
    if base.numel() > 50:
        assert 0 < (found.reshape(shape) == other).float().mean() < 0.5


def test_passthrough() -> None:
    row = noise(1, 50)

    assert torch.equal(whole("passthrough", row), row[0])
    assert torch.equal(whole("passthrough", row, scale=0.5), row[0] * 0.5)
    assert torch.equal(whole("passthrough", row, scale=0.0), torch.zeros(50))


# -- identities

ANY_NUMBER = ["multislerp", "karcher", "model_stock"]
BY_ROWS = {"nuslerp": {"nuslerp_flatten": False}, "model_stock": {"filter_wise": True}}


@pytest.mark.parametrize("name", ["nuslerp", "multislerp", "karcher", "model_stock", "arcee_fusion"])
def test_equal_models_merge_into_themselves(name: str) -> None:
    row = noise(500)
    count = 4 if name in ANY_NUMBER else 2

    torch.testing.assert_close(whole(name, row.repeat(count, 1)), row)
    torch.testing.assert_close(whole(name, row.repeat(count, 1), shape=(20, 25), **BY_ROWS.get(name, {})), row)


@pytest.mark.parametrize("name", ANY_NUMBER)
def test_the_order_of_models_does_not_matter(name: str) -> None:
    rows, order = noise(4, 500) + 0.2 * noise(500, seed=1), [3, 1, 0, 2]
    weights = {"weight": (1.0, 0.5, 2.0, 0.7)} if name == "multislerp" else {}
    moved = {key: tuple(value[place] for place in order) for key, value in weights.items()}

    torch.testing.assert_close(whole(name, rows, **weights), whole(name, rows[order], **moved))


def test_the_ends() -> None:
    rows = noise(2, 500)

    for end in (0, 1):
        weight = (1.0 - end, 0.0 + end)
        torch.testing.assert_close(whole("nuslerp", rows, weight=weight), rows[end])
        torch.testing.assert_close(
            whole("nuslerp", rows, shape=(20, 25), weight=weight, **BY_ROWS["nuslerp"]), rows[end]
        )
        torch.testing.assert_close(whole("multislerp", rows, weight=weight), rows[end])
    assert torch.equal(whole("nearswap", rows[:1], t=0.0), torch.zeros(500))
    assert torch.equal(whole("nearswap", rows[:1], t=100.0), rows[0])


@pytest.mark.parametrize("name", ["nuslerp", "multislerp", "karcher", "model_stock", "arcee_fusion"])
@pytest.mark.parametrize("other", [0.0, 1.0, 3.0, -1.0, -3.0])
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-6, 1.0, 1e10])
@pytest.mark.parametrize("elements", [1, 6])
def test_zero_parallel_and_opposite_tensors_are_no_trouble(name: str, other: float, size: float, elements: int) -> None:
    """Whatever the lengths: everything is finite, and no element grows beyond the larger model's."""
    row = noise(elements) * size
    rows = torch.stack([row, row * other])

    for more in ({}, BY_ROWS.get(name, {})):
        merged = whole(name, rows, shape=(elements,), **more)
        assert merged.shape == row.shape
        assert torch.isfinite(merged).all()
        assert (merged.abs() <= rows.abs().amax(0) * (1 + 1e-6)).all()
    scalar = whole(name, rows[:, :1], shape=())
    assert torch.isfinite(scalar).all()
