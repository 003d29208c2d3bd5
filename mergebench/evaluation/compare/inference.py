"""Tests of a difference, each with the interval that inverts it: p is below 0.05 where the interval leaves out 0.

Right or wrong: McNemar's test, and Tango's interval of all differences that the same score test does not reject. For
paired shares Fagerland, Lydersen and Laake (2014, Statistics in Medicine 33:2850) recommend both. Any other scores: a
paired bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

Interval = tuple[float, float]
Z = 1.959963984540054  # the normal law's 97.5% quantile
RESAMPLES, SEED = 9999, 0
HALVINGS = 60  # of a bracket at most 2 wide


def mcnemar(lost: int, won: int) -> float:
    """Two-sided p, if each flipped item is as likely lost as won: of z = (won - lost) / sqrt(won + lost)."""
    return math.erfc(abs(score(lost, won, 1, 0.0)) / math.sqrt(2))


def tango(lost: int, won: int, n: int) -> Interval:
    """95% interval of the difference (won - lost) / n of paired shares (Tango 1998, Statistics in Medicine 17:891)."""
    between = (won - lost) / n
    low = _last(lambda difference: score(lost, won, n, difference) >= Z, -1.0, between)
    high = _last(lambda difference: score(lost, won, n, difference) >= -Z, between, 1.0)
    return low, high


def score(lost: int, won: int, n: int, difference: float) -> float:
    """How far the counts are from a true difference, in standard errors under the likeliest shares that have it."""
    b = (2 * n - won + lost) * difference - won - lost
    c = -lost * difference * (1 - difference)
    share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)  # of lost items, the root of 2 n q^2 + b q + c
    variance = n * (2 * share + difference * (1 - difference))
    away = won - lost - n * difference
    if variance > 0:
        return away / math.sqrt(variance)
    return math.copysign(math.inf, away) if away else 0.0


def _last(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The last value from low to high up to which something holds, by bisection."""
    if holds(high):
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@lru_cache(maxsize=64)  # tables, document and page show the same comparison
def bootstrap(change: tuple[float, ...]) -> tuple[Interval | None, float | None]:
    """Percentile interval of the mean change and twice the smaller tail beyond 0, by resampling items; a fixed seed."""
    import numpy as np

    if len(change) == 1:
        return None, None
    source, values = np.random.default_rng(SEED), np.array(change)
    means = np.empty(RESAMPLES)
    batch = max(1, 2_000_000 // len(change))  # resamples at once: 32 MB
    for first in range(0, RESAMPLES, batch):
        part = means[first : first + batch]
        part[:] = values[source.integers(0, len(values), (len(part), len(values)))].mean(1)
    means.sort()
    tail = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    outside = (RESAMPLES + 1) // 40 - 2  # means on each side; one more, and p would be 0.05
    p = min(1.0, 2 * (tail + 1) / (RESAMPLES + 1))
    return (float(means[outside]), float(means[-1 - outside])), p


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Each p adjusted for all (Holm 1979): at most 5% of such families have a true null with an adjusted p <= 0.05."""
    known = sorted((p, place) for place, p in enumerate(ps) if p is not None)
    found: list[float | None] = [None] * len(ps)
    most = 0.0
    for rank, (p, place) in enumerate(known):
        found[place] = most = min(1.0, max(most, (len(known) - rank) * p))
    return found


def end_of(right: bool, n: int) -> float:
    """The far end of the exact 95% interval of a share (Clopper and Pearson 1934), where all n items are right, or
    all are wrong."""
    least = float(0.025 ** (1 / n))
    return least if right else 1 - least
