"""Verdicts: whether a new model may replace an old one, given how much each task may lose.

The difference d of a task, new minus old, has a 95% interval [low, high]. With a drop of L allowed

    BLOCK          high < 0 and d < -L    worse beyond chance, by more than L
    WARN           high < 0 and d >= -L   worse beyond chance, within L
    PASS           low >= -L              a drop of more than L is excluded
    INCONCLUSIVE   otherwise              the items cannot tell

A bound on the NFR holds for the share that was counted, and blocks. The worst verdict of the tasks is that of the
whole, as in a gate of NeMo Evaluator: BLOCK, INCONCLUSIVE, WARN, PASS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mergebench.evaluation.compare.comparison import Comparison
from mergebench.evaluation.compare.flips import Flips

Verdict = Literal["PASS", "WARN", "INCONCLUSIVE", "BLOCK"]
ORDER: tuple[Verdict, ...] = ("PASS", "WARN", "INCONCLUSIVE", "BLOCK")
POINT = 0.01


@dataclass(frozen=True)
class Limits:
    """What a task may lose. None: no bound."""

    max_drop: float | None = None  # of right and wrong answers a share, else in the metric's own unit
    max_nfr: float | None = None
    advisory: bool = False  # judged and shown; it decides nothing

    def over(self, other: Limits) -> Limits:
        """These limits, the other's where there are none."""
        drop = other.max_drop if self.max_drop is None else self.max_drop
        return Limits(drop, other.max_nfr if self.max_nfr is None else self.max_nfr, self.advisory)


@dataclass(frozen=True)
class Policy:
    """Limits of every task, of single ones, and of all items together."""

    each: Limits = Limits(max_drop=POINT)
    tasks: Mapping[str, Limits] = field(default_factory=dict)  # as the table of rates names them, or all metrics of one
    total: Limits | None = None
    inconclusive_blocks: bool = False


@dataclass(frozen=True)
class Judged:
    """A task's verdict."""

    task: str  # as in the table of rates; `total`: all items together
    metric: str
    verdict: Verdict | None  # None: no limit applies to its scores
    limits: Limits
    flips: Flips | None  # None: it was not measured
    reasons: tuple[str, ...] = ()  # of a BLOCK: "drop" and "nfr", or "missing"

    def to_dict(self) -> dict[str, Any]:
        known = {} if self.flips is None else {"difference": self.flips.difference, "detectable": self.flips.detectable}
        return {"task": self.task, "metric": self.metric, "verdict": self.verdict, **vars(self.limits), **known}


@dataclass(frozen=True)
class Judgement:
    """All verdicts, and the one that follows."""

    rows: tuple[Judged, ...]
    policy: Policy

    @property
    def verdict(self) -> Verdict:
        found: list[Verdict] = [row.verdict for row in self.rows if row.verdict is not None and not row.limits.advisory]
        return max(found, key=ORDER.index, default="PASS")

    @property
    def passed(self) -> bool:
        """Whether a gate lets the new model through."""
        verdict = self.verdict
        return verdict in ("PASS", "WARN") or (verdict == "INCONCLUSIVE" and not self.policy.inconclusive_blocks)

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "passed": self.passed, "tasks": [row.to_dict() for row in self.rows]}


def judge(comparison: Comparison, policy: Policy) -> Judgement:
    """The verdict on every task, on tasks that a policy names and no run has, and on all items together.

    The limits of every task bound the drops of right and wrong answers alone: other scores have units of their own, and
    a task of such scores is judged where the policy names it.
    """
    rows = []
    for name, pair in comparison.named:
        own = policy.tasks.get(name, policy.tasks.get(pair.task))
        limits = policy.each if own is None else own.over(policy.each)
        if not pair.flips.share and (own is None or own.max_drop is None):
            limits = Limits(None, limits.max_nfr, limits.advisory)
        rows.append(_judged(name, pair.metric, limits, pair.flips))
    measured = {known for name, pair in comparison.named for known in (name, pair.task)}
    for task, limits in policy.tasks.items():
        if task not in measured:
            rows.append(Judged(task, "", "BLOCK", limits.over(policy.each), None, ("missing",)))
    if policy.total is not None and comparison.pooled is not None:
        rows.append(_judged("total", comparison.pooled_pairs[0].metric, policy.total, comparison.pooled))
    return Judgement(tuple(rows), policy)


def _judged(task: str, metric: str, limits: Limits, found: Flips) -> Judged:
    reasons: list[str] = []
    verdicts: list[Verdict] = []
    if limits.max_drop is not None:
        verdicts.append(_of_drop(found, limits.max_drop))
        reasons += ["drop"] * (verdicts[-1] == "BLOCK")
    if limits.max_nfr is not None:
        verdicts.append("PASS" if found.nfr <= limits.max_nfr else "BLOCK")
        reasons += ["nfr"] * (verdicts[-1] == "BLOCK")
    verdict = max(verdicts, key=ORDER.index, default=None)
    return Judged(task, metric, verdict, limits, found, tuple(reasons))


def _of_drop(found: Flips, most: float) -> Verdict:
    if found.interval is None:
        return "INCONCLUSIVE"
    low, high = found.interval
    if high < 0:
        return "BLOCK" if found.difference < -most else "WARN"
    return "PASS" if low >= -most else "INCONCLUSIVE"


def named(rows: Sequence[Judged], verdict: Verdict) -> list[Judged]:
    """The rows of one verdict that decide, the largest loss first."""
    found = [row for row in rows if row.verdict == verdict and not row.limits.advisory]
    return sorted(found, key=lambda row: -1.0 if row.flips is None else row.flips.difference)
