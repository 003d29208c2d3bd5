"""Intervals and p: published values, brute force over likelihoods and over every table, and one verdict from both."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergebench.evaluation.compare.inference import RESAMPLES, Z, bootstrap, end_of, holm, mcnemar, score, tango


def test_a_published_interval() -> None:
    """Fagerland, Lydersen and Laake 2014: airway hyper-responsiveness of 21 children, 7 and 1 pairs that differ."""
    assert tuple(round(end, 3) for end in tango(7, 1, 21)) == (-0.517, -0.026)


def test_of_many_items_it_is_the_normal_laws() -> None:
    lost, won, n = 4300, 7500, 80_000
    reach = Z * math.sqrt(lost + won - (won - lost) ** 2 / n) / n
    assert tango(lost, won, n) == pytest.approx(((won - lost) / n - reach, (won - lost) / n + reach), abs=0.01 * reach)


@pytest.mark.parametrize("n", [5, 300])
def test_no_flips_are_no_proof(n: int) -> None:
    """Solved by hand: z^2 = n d / (1 - d)."""
    assert tango(0, 0, n) == pytest.approx((-Z * Z / (n + Z * Z), Z * Z / (n + Z * Z)))
    assert mcnemar(0, 0) == 1


@pytest.mark.parametrize(("lost", "won", "n"), [(2, 5, 12), (0, 4, 9), (7, 1, 21), (3, 3, 10), (0, 6, 6)])
@pytest.mark.parametrize("difference", [-0.6, -0.2, 0.0, 0.13, 0.5])
def test_the_score_is_of_the_likeliest_shares(lost: int, won: int, n: int, difference: float) -> None:
    """The shares are looked for on a fine grid of all that have this difference."""
    best, found = -math.inf, 0.0
    steps = 4000
    for step in range(1, steps):
        down = step / steps
        up = down + difference
        rest = 1 - up - down
        if up <= 0 or rest <= 0:
            continue
        likelihood = lost * math.log(down) + won * math.log(up) + (n - lost - won) * math.log(rest)
        if likelihood > best:
            best, found = likelihood, down
    error = math.sqrt(n * (2 * found + difference - difference**2))
    assert score(lost, won, n, difference) == pytest.approx((won - lost - n * difference) / error, rel=2e-3, abs=1e-9)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 400))
def test_one_verdict_of_right_and_wrong(lost: int, won: int, rest: int) -> None:
    n = max(lost + won + rest, 1)
    low, high = tango(lost, won, n)
    assert -1 <= low <= (won - lost) / n <= high <= 1
    assert (low > 0 or high < 0) == (mcnemar(lost, won) < 0.05)
    turned = tango(won, lost, n)
    assert turned == pytest.approx((-high, -low))


@given(st.lists(st.integers(-9, 12), min_size=2, max_size=40), st.integers(-3, 3))
def test_one_verdict_of_scores(values: list[int], shift: int) -> None:
    """Also where resampled means are 0 exactly."""
    interval, p = bootstrap(tuple(value + shift / 2 for value in values))
    assert interval is not None and p is not None
    assert (interval[0] > 0 or interval[1] < 0) == (p < 0.05)


@pytest.mark.parametrize("shares", [(0.6, 0.1, 0.2, 0.1), (0.3, 0.05, 0.3, 0.35), (0.7, 0.1, 0.1, 0.1)])
def test_the_interval_covers_the_truth(shares: tuple[float, ...]) -> None:
    """The chance that the interval of 12 items has the true difference inside, summed over every table there is."""
    n, truth = 12, shares[2] - shares[1]
    covered = 0.0
    for both, lost, won in product(range(n + 1), repeat=3):
        counts = (both, lost, won, n - both - lost - won)
        if counts[3] < 0:
            continue
        ways = math.factorial(n) / math.prod(map(math.factorial, counts))
        low, high = tango(lost, won, n)
        covered += ways * math.prod(s**c for s, c in zip(shares, counts, strict=True)) * (low <= truth <= high)
    assert 0.93 < covered < 0.98


@pytest.mark.parametrize("flipping", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("n", [20, 60])
def test_equal_models_are_rarely_called_different(flipping: float, n: int) -> None:
    """The chance of p < 0.05, summed over how many items flip and how many of these are won."""
    wrongly = 0.0
    for flips in range(n + 1):
        weight = math.comb(n, flips) * flipping**flips * (1 - flipping) ** (n - flips)
        wrongly += weight * sum(
            math.comb(flips, w) / 2**flips for w in range(flips + 1) if mcnemar(flips - w, w) < 0.05
        )
    assert wrongly < 0.055


def test_the_bootstrap_is_that_of_scipy() -> None:
    """Another program's resamples: the same ends, as near as 9999 means give them."""
    from scipy.stats import bootstrap as scipys

    source = random.Random(5)
    values = tuple(source.expovariate(1) - 0.8 for _ in range(80))
    interval, _ = bootstrap(values)
    there = scipys((values,), lambda x, axis: x.mean(axis), method="percentile", n_resamples=RESAMPLES, rng=1)
    error = float(there.standard_error)
    assert interval == pytest.approx(tuple(there.confidence_interval), abs=0.1 * error)


@pytest.mark.parametrize("n", [1, 4, 300])
def test_the_end_of_an_exact_interval(n: int) -> None:
    """At this share, all items are right with a probability of 2.5%: that is how Clopper and Pearson define it."""
    from scipy.stats import binomtest

    assert end_of(True, n) ** n == pytest.approx(0.025)
    assert end_of(True, n) == pytest.approx(binomtest(n, n).proportion_ci(method="exact").low)
    assert end_of(False, n) == pytest.approx(binomtest(0, n).proportion_ci(method="exact").high)


def test_holm() -> None:
    """By hand; what has no p takes no part."""
    found = holm([0.01, None, 0.04, 0.03, 0.005])
    assert found == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06), pytest.approx(0.02)]
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_rejects_what_its_steps_reject(ps: list[float]) -> None:
    """Brute force: from the smallest on, as long as each is below 0.05 divided by how many are left."""
    rejected = set()
    for rank, (p, place) in enumerate(sorted((p, place) for place, p in enumerate(ps))):
        if p * (len(ps) - rank) >= 0.05:
            break
        rejected.add(place)
    assert {place for place, p in enumerate(holm(ps)) if p is not None and p < 0.05} == rejected
