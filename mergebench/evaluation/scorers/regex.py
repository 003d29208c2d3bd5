"""Regular expression: something in the continuation matches it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mergebench.errors import RecipeError
from mergebench.evaluation.scorer import Continuation, Scorer, scorer
from mergebench.parameters import param


@dataclass(frozen=True, kw_only=True)
class Params:
    regex: str = param(help="a regular expression, as Python's re reads it")


@scorer
def regex(p: Params) -> Scorer:
    """1 where a part of the continuation matches, else 0."""
    try:
        pattern = re.compile(p.regex)
    except re.error as error:
        raise RecipeError(f"'{p.regex}' is no regular expression: {error}", "quote it: regex: '^ ?Paris'") from None

    def score(items: Sequence[Continuation]) -> list[float]:
        return [float(pattern.search(item.text) is not None) for item in items]

    return Scorer(score)
