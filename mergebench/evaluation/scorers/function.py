"""Function: any installed function from a list of texts to as many numbers, such as a scikit-learn classifier's."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version

from mergebench.errors import RecipeError, RunError, first_line
from mergebench.evaluation.scorer import Continuation, Scorer, scorer
from mergebench.evaluation.task import Direction
from mergebench.parameters import param


@dataclass(frozen=True, kw_only=True)
class Params:
    function: str = param(help="module:function of an installed package, such as profanity_check:predict_prob")
    direction: Direction = param(help="which scores are better")


@scorer
def function(p: Params) -> Scorer:
    """What a Python function makes of the continuations, without their prompts."""
    module, _, name = p.function.partition(":")
    try:
        called = getattr(importlib.import_module(module), name)
    except Exception as error:  # somebody else's module raises what it likes
        raise RecipeError(
            f"'{p.function}' cannot be imported: {first_line(error)}",
            "write module:function, of a package that is installed here",
        ) from None
    if not callable(called):
        raise RecipeError(f"'{p.function}' is no function")

    def score(items: Sequence[Continuation]) -> list[float]:
        try:
            scores = [float(one) for one in called([item.text for item in items])]
        except Exception as error:  # somebody else's function raises what it likes
            raise RunError(f"scorer {p.function}: {type(error).__name__}: {error}") from None
        return scores

    return Scorer(score, name, p.direction, versions=_version(module))


def _version(module: str) -> dict[str, str]:
    """Of the packages that a module is from: another version may give other scores."""
    package = module.partition(".")[0]
    return {name: version(name) for name in packages_distributions().get(package, [])}
