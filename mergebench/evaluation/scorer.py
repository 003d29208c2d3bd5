"""Scorers: parameters in a suite, and a function from a prompt and its continuation to a number.

    @dataclass(frozen=True, kw_only=True)
    class Params:
        regex: str = param(help="what a right continuation holds")

    @scorer
    def regex(p: Params) -> Scorer:
        ...

In a suite: `scorer: exact-match`, or a mapping with the scorer's name and its parameters, `scorer: {regex: "^Paris"}`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mergebench.errors import RunError
from mergebench.evaluation.task import Direction
from mergebench.parameters import Parameter, parameters_of, params_of


class Continuation(NamedTuple):
    """A model's continuation of a prompt, and the target, if the task has one."""

    prompt: str
    text: str
    target: str  # empty if the scorer needs none


@dataclass(frozen=True)
class Scorer:
    """A scorer with its parameters filled in."""

    score: Callable[[Sequence[Continuation]], Sequence[float]]  # a number for each
    metric: str = "accuracy"  # then each number is 1 or 0
    direction: Direction = "higher"
    target: bool = False  # whether the scorer needs a target
    files: tuple[Path, ...] = ()  # all files read; results depend on their content
    versions: dict[str, str] = field(default_factory=dict)  # of further libraries that the scores depend on
    spec: str = ""  # name and parameters, filled in when a suite is read

    def __call__(self, items: Iterable[Continuation]) -> list[float]:
        """A number for each continuation; `RunError` if the scorer returns anything else."""
        asked = list(items)
        scores = [float(one) for one in self.score(asked)]
        if len(scores) != len(asked) or not all(map(math.isfinite, scores)):
            raise RunError(f"scorer {self.spec}: {len(asked)} continuations need as many finite numbers")
        return scores

    def __str__(self) -> str:
        return self.spec


@dataclass(frozen=True)
class ScorerKind:
    """A scorer and its properties for a suite."""

    name: str  # as suites spell it: exact-match
    function: Callable[[Any], Scorer]
    params: type
    parameters: Mapping[str, Parameter]

    def __call__(self, params: Any) -> Scorer:
        plain = {name: value for name, value in vars(params).items() if not isinstance(value, Path)}
        return replace(self.function(params), spec=f"{self.name} {plain}" if plain else self.name)

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]


def scorer(function: Callable[[Any], Scorer]) -> ScorerKind:
    """Declare a function `(params: a dataclass) -> Scorer` as a scorer."""
    params = params_of(function, 1, "a scorer takes (params: a dataclass)")
    return ScorerKind(function.__name__.replace("_", "-"), function, params, parameters_of(params))
