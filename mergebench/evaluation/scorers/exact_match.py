"""Exact match: the continuation is the target, space around both left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergebench.evaluation.scorer import Continuation, Scorer, scorer


@dataclass(frozen=True, kw_only=True)
class Params:
    pass


@scorer
def exact_match(p: Params) -> Scorer:
    """1 where the continuation is the target, space around both left out, else 0."""

    def score(items: Sequence[Continuation]) -> list[float]:
        return [float(item.text.strip() == item.target.strip()) for item in items]

    return Scorer(score, target=True)
