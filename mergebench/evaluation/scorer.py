"""What a scorer is: the keys it has in a suite, and a function from a prompt and its continuation to a number.

    @dataclass(frozen=True, kw_only=True)
    class Params:
        regex: str = key("what a right continuation holds")

    @scorer
    def regex(p: Params) -> Scorer:
        ...

In a suite: `scorer: exact-match`, or a mapping with the scorer's name and its keys, `scorer: {regex: "^Paris"}`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mergebench.evaluation.task import Direction, Key, keys_of


class Continuation(NamedTuple):
    """What a model wrote after a prompt, and what it should have written, where the task has that."""

    prompt: str
    text: str
    target: str | None


@dataclass(frozen=True)
class Scorer:
    """A scorer with its keys filled in."""

    score: Callable[[Sequence[Continuation]], Sequence[float]]  # a number for each
    metric: str = "accuracy"  # then each number is 1 or 0
    direction: Direction = "higher"
    target: bool = False  # whether it needs one
    files: tuple[Path, ...] = ()  # everything that was read, to tell results of another scorer apart


@dataclass(frozen=True)
class ScorerKind:
    """A scorer and what a suite must know about it."""

    name: str  # as suites spell it: exact-match
    function: Callable[[Any], Scorer]
    params: type
    keys: Mapping[str, Key]

    def __call__(self, params: Any) -> Scorer:
        return self.function(params)

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]


def scorer(function: Callable[[Any], Scorer]) -> ScorerKind:
    """Declare a function `(params: a dataclass) -> Scorer` as a scorer."""
    params = keys_of(function)
    return ScorerKind(function.__name__.replace("_", "-"), function, *params)
