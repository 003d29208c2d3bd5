"""Flips: the items that a new model answers worse, or better, than an old model; equal accuracy can hide both.

Negative flips as in MUSCLE (arXiv:2407.09435, section 3), BTC as in Srivastava et al. 2020. With S an item's score
and D = S(new) - S(old), turned round where lower scores are better, so that D > 0 is always an improvement:

    NFR = mean 1[D < 0]     regression m_r = mean of |D| over D < 0
    PFR = mean 1[D > 0]     gain       m_g = mean of D over D > 0       m_g PFR - m_r NFR = mean D

Where every item is right or wrong (S is 1 or 0) a negative flip is an item lost, PFR - NFR the difference of the
accuracies, and besides

    NFR_mc = mean 1[new wrong, and not with old's answer]     BTC = P(new right | old right) = 1 - NFR / accuracy of old

The difference has a 95% interval and a two-sided p, which come from one test (`inference`). What so many items can
show at all is the difference that the test finds four times in five (power 80%): 2.8 standard errors of the paired
difference, sqrt(flips / n) / sqrt(n) of right and wrong answers, and at least the 4 flips that p < 0.05 takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergebench.errors import RunError
from mergebench.evaluation.compare.inference import Interval, Z, bootstrap, mcnemar, tango
from mergebench.evaluation.task import Direction, Prediction

POWER = 0.8416212335729143  # the normal law's 80% quantile
FEWEST = 4  # items lost and none won, for McNemar's p below 0.05
Answers = Mapping[Any, Prediction]  # by the items' ids


@dataclass(frozen=True)
class Flips:
    """A new model's answers compared with an old model's; made by `flips`. Rates are shares of all n items."""

    n: int
    share: bool  # whether scores are shares of right answers: 1 or 0, or the mean of several answers to an item
    old: float  # mean score; of shares the accuracy
    new: float
    difference: float  # mean D
    interval: Interval | None  # of the difference, 95%; None if there is only one item to resample
    p: float | None
    lost: tuple[Any, ...]  # ids with D < 0, the largest loss first
    won: tuple[Any, ...]  # ids with D > 0, the largest gain first
    regression: float | None  # None where nothing is lost
    gain: float | None  # None where nothing is won
    both_right: int | None = None  # with lost, won and both_wrong: all n. None where scores are not right or wrong
    both_wrong: int | None = None
    wrong_differently: int | None = None  # of both_wrong

    @property
    def nfr(self) -> float:
        return len(self.lost) / self.n

    @property
    def pfr(self) -> float:
        return len(self.won) / self.n

    @property
    def nfr_mc(self) -> float | None:
        return None if self.wrong_differently is None else (len(self.lost) + self.wrong_differently) / self.n

    @property
    def btc(self) -> float | None:
        """None also if the old model is never right."""
        if self.both_right is None or not (before := self.both_right + len(self.lost)):
            return None
        return self.both_right / before

    @property
    def nfr_expected(self) -> float | None:
        """The NFR if the two models erred independently."""
        return None if self.both_right is None else self.old * (1 - self.new)

    @property
    def nfr_least(self) -> float | None:
        """The least NFR possible at the new accuracy."""
        return None if self.both_right is None else max(0.0, self.old - self.new)

    @property
    def detectable(self) -> float | None:
        """The smallest true difference that so many items show, at p < 0.05 with a power of 80%; None if unknown."""
        if self.both_right is not None:
            return max(FEWEST / self.n, (Z + POWER) * math.sqrt(len(self.lost) + len(self.won)) / self.n)
        if self.interval is None:
            return None
        low, high = self.interval
        return (Z + POWER) * (high - low) / (2 * Z)

    def to_dict(self) -> dict[str, Any]:
        """Every number, ready for JSON; items by their count."""
        return {
            **vars(self),
            "lost": len(self.lost),
            "won": len(self.won),
            "nfr": self.nfr,
            "pfr": self.pfr,
            "nfr_mc": self.nfr_mc,
            "btc": self.btc,
            "nfr_expected": self.nfr_expected,
            "nfr_least": self.nfr_least,
            "detectable": self.detectable,
        }


def flips(old: Answers, new: Answers, direction: Direction = "higher", *, share: bool = False) -> Flips:
    """Compare two models' answers to the same items; `RunError` if their items differ, or there are none.

    direction: which scores are better. Scores that are all 0 or 1, where higher is better, mean wrong and right; share:
    others are means of such.
    """
    for here, there, name in ((old, new, "new"), (new, old, "old")):
        missing = [str(item) for item in here if item not in there]
        if missing:
            shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            what = f"the {name} answers lack {len(missing)} of the other's {len(here)} items: {shown}"
            raise RunError(what, "flips are counted on the same items: measure both on the same data")
    if not old:
        raise RunError("there are no items to compare")
    sign = 1 if direction == "higher" else -1
    change = {item: sign * (new[item].score - before.score) for item, before in old.items()}
    lost = sorted((item for item, d in change.items() if d < 0), key=lambda item: change[item])
    won = sorted((item for item, d in change.items() if d > 0), key=lambda item: -change[item])
    quadrants: dict[str, int] = {}
    interval: Interval | None
    p: float | None
    if direction == "higher" and all(one.score in (0, 1) for side in (old, new) for one in side.values()):
        wrong = [item for item in old if old[item].score == new[item].score == 0]
        quadrants["both_right"] = len(old) - len(lost) - len(won) - len(wrong)
        quadrants["both_wrong"] = len(wrong)
        quadrants["wrong_differently"] = sum(old[item].output != new[item].output for item in wrong)
        interval, p = tango(len(lost), len(won), len(old)), mcnemar(len(lost), len(won))
    else:
        interval, p = bootstrap(tuple(change.values()))
    return Flips(
        n=len(old),
        share=bool(quadrants) or (share and direction == "higher"),
        old=_mean([one.score for one in old.values()]),
        new=_mean([one.score for one in new.values()]),
        difference=_mean(list(change.values())),
        interval=interval,
        p=p,
        lost=tuple(lost),
        won=tuple(won),
        regression=-_mean([change[item] for item in lost]) if lost else None,
        gain=_mean([change[item] for item in won]) if won else None,
        **quadrants,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
