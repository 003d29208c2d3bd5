"""Flips: golden values, and the identities of the paper on random tables; tests and intervals: `test_inference`."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergebench.errors import RunError
from mergebench.evaluation.compare.flips import Answers, Flips, flips
from mergebench.evaluation.compare.inference import RESAMPLES
from mergebench.evaluation.task import Prediction


def answers(outputs: str, gold: str) -> Answers:
    """One letter an item; ids are i0, i1, …"""
    return {
        f"i{n}": Prediction(one, float(one == right)) for n, (one, right) in enumerate(zip(outputs, gold, strict=True))
    }


def scores(*values: float) -> Answers:
    return {f"i{n}": Prediction(str(value), value) for n, value in enumerate(values)}


def table(both: int, lost: int, won: int, wrong: int = 0, differently: int = 0) -> Flips:
    gold = "a" * (both + lost + won + wrong + differently)
    old = "a" * (both + lost) + "b" * (won + wrong + differently)
    new = "a" * both + "b" * lost + "a" * won + "b" * wrong + "c" * differently
    return flips(answers(old, gold), answers(new, gold))


def test_golden() -> None:
    """Worked out by hand: 5 of 8 right before, 3 after."""
    found = flips(answers("01200111", "01201201"), answers("01121010", "01201201"))
    assert (found.n, found.old, found.new, found.difference) == (8, 5 / 8, 3 / 8, -2 / 8)
    assert (found.lost, found.won) == (("i2", "i3", "i7"), ("i4",))
    assert (found.both_right, found.both_wrong, found.wrong_differently) == (2, 2, 1)
    assert (found.nfr, found.pfr, found.nfr_mc, found.btc) == (0.375, 0.125, 0.5, 0.4)
    assert (found.nfr_expected, found.nfr_least) == (25 / 64, 0.25)
    assert found.p == pytest.approx(math.erfc(2 / math.sqrt(4) / math.sqrt(2)))  # two more lost than won, of four


def test_golden_of_scores() -> None:
    """D = .3, -.1, 0, -.5, .1: means by hand; where lower is better everything turns round."""
    old, new = scores(0.2, 0.6, 0.5, 1.5, 0.25), scores(0.5, 0.5, 0.5, 1.0, 0.35)
    up, down = flips(old, new), flips(old, new, "lower")
    assert (up.lost, up.won) == (("i3", "i1"), ("i0", "i4")) == (down.won, down.lost)
    assert (up.nfr, up.pfr) == (0.4, 0.4)
    assert (up.gain, up.regression) == (pytest.approx(0.2), pytest.approx(0.3))
    assert (down.gain, down.regression) == (up.regression, up.gain)
    assert (up.difference, down.difference) == (pytest.approx(-0.04), pytest.approx(0.04))
    assert (up.old, up.new) == (pytest.approx(0.61), pytest.approx(0.57)) == (down.old, down.new)
    assert {up.both_right, up.nfr_mc, up.btc, up.nfr_expected, up.nfr_least, down.both_wrong} == {None}


letters = st.lists(st.tuples(*[st.sampled_from("abc")] * 3), min_size=1, max_size=60)


@given(letters)
def test_identities_of_right_and_wrong(items: list[tuple[str, str, str]]) -> None:
    """Exact in fractions, against counts made here from the answers."""
    gold, before, after = map("".join, zip(*items, strict=True))
    found = flips(answers(before, gold), answers(after, gold))
    n = len(items)
    right = [(a == g, b == g, a != b) for g, a, b in items]
    acc1, acc2 = (Fraction(sum(one[i] for one in right), n) for i in (0, 1))
    nfr, pfr = (Fraction(len(side), n) for side in (found.lost, found.won))
    both_right = Fraction(sum(a and b for a, b, _ in right), n)
    other_wrong = Fraction(sum(not a and not b and differ for a, b, differ in right), n)

    assert {int(item[1:]) for item in found.lost} == {i for i, (a, b, _) in enumerate(right) if a and not b}
    assert pfr - nfr == acc2 - acc1
    assert nfr == acc1 - both_right
    assert (found.old, found.new, found.nfr, found.pfr) == (float(acc1), float(acc2), float(nfr), float(pfr))
    assert found.nfr_mc == float(nfr + other_wrong)
    assert found.nfr_mc == float(Fraction(sum(not b and differ for _, b, differ in right), n))
    assert found.btc == (pytest.approx(float(1 - nfr / acc1)) if acc1 else None)
    assert max(0, acc1 - acc2) <= nfr <= min(acc1, 1 - acc2)
    assert found.nfr_least == pytest.approx(float(max(0, acc1 - acc2)))
    assert found.nfr_expected == pytest.approx(float(acc1 * (1 - acc2)))
    assert found.both_right == both_right * n
    assert (found.gain, found.regression) == (1.0 if pfr else None, 1.0 if nfr else None)
    assert found.difference == pytest.approx(float(acc2 - acc1))
    assert found.interval is not None
    assert -1 <= found.interval[0] <= found.difference <= found.interval[1] <= 1


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=1, max_size=12), st.booleans())
def test_identities_of_scores(items: list[tuple[int, int]], lower: bool) -> None:
    old, new = (scores(*(one[i] / 8 + 0.3 for one in items)) for i in (0, 1))
    found = flips(old, new, "lower" if lower else "higher")
    change = [(b - a) / 8 * (-1 if lower else 1) for a, b in items]
    mean = sum(change) / len(items)
    assert (found.gain or 0) * found.pfr - (found.regression or 0) * found.nfr == pytest.approx(mean)
    assert found.difference == pytest.approx(mean)
    assert (found.nfr, found.pfr) == (sum(d < 0 for d in change) / len(items), sum(d > 0 for d in change) / len(items))
    worst = [change[int(item[1:])] for item in (*found.lost, *reversed(found.won))]
    assert worst == pytest.approx(sorted(worst))
    if found.interval is not None:
        slack = 1e-9
        assert min(change) - slack <= found.interval[0] <= found.interval[1] <= max(change) + slack


def test_the_bootstrap_agrees_with_the_normal_law() -> None:
    """Many items: the mean's interval is ± 1.96 standard errors, and p the normal tail."""
    source = random.Random(3)
    change = [source.gauss(0.1, 1) for _ in range(600)]
    found = flips(scores(*[0.5] * 600), scores(*(0.5 + d for d in change)))
    mean = sum(change) / 600
    error = (sum((d - mean) ** 2 for d in change) / 600) ** 0.5 / 600**0.5
    assert found.interval is not None and found.p is not None
    assert found.interval == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.1 * error)
    assert found.p == pytest.approx(math.erfc(abs(mean) / error / 2**0.5), rel=0.3)
    assert flips(scores(*[0.5] * 600), scores(*(0.5 + d for d in change))) == found  # a fixed seed


def test_the_smallest_cases() -> None:
    assert table(0, 1, 0).btc == 0
    assert table(0, 0, 1).btc is None  # nothing was right
    same = flips(scores(0.5, 0.7), scores(0.5, 0.7))
    assert (same.p, same.interval, same.gain, same.regression, same.nfr) == (1.0, (0.0, 0.0), None, None, 0)
    one = flips(scores(0.5), scores(0.7))
    assert (one.p, one.interval, one.pfr) == (None, None, 1)
    better = flips(scores(0.5, 0.7), scores(0.6, 0.8))
    assert better.p == 2 / (RESAMPLES + 1)
    assert flips(scores(0, 1), scores(1, 1), "lower").both_right is None  # a share of what should not be


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (scores(1, 0), scores(1), "the new answers lack 1 of the other's 2 items: i1"),
        (scores(1), scores(*range(9)), "the old answers lack 8 of the other's 9 items: i1, i2, i3, …"),
        ({}, {}, "no items"),
    ],
)
def test_other_items(old: Answers, new: Answers, says: str) -> None:
    with pytest.raises(RunError, match=says):
        flips(old, new)


def test_ready_for_json() -> None:
    import json

    document: dict[str, Any] = json.loads(json.dumps(table(2, 3, 1, 1, 1).to_dict()))
    assert document.keys() == {
        "n", "share", "old", "new", "difference", "interval", "p", "lost", "won", "regression", "gain", "both_right",
        "both_wrong", "wrong_differently", "nfr", "pfr", "nfr_mc", "btc", "nfr_expected", "nfr_least", "detectable",
    }  # fmt: skip
    assert (document["lost"], document["won"], document["wrong_differently"]) == (3, 1, 1)
