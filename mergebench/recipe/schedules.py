"""Weights of the checkpoints of one run, `schedule:` in a recipe.

theta_0, ..., theta_k are the checkpoints by their steps, n = k + 1 of them, and c_0, ..., c_k their weights, which add
up to 1. WSM (arXiv:2507.17634) shows what such an average stands for: with g_j = theta_j - theta_(j-1),

    sum c_j theta_j = theta_0 + sum w_j g_j,    w_j = c_j + ... + c_k,

as if the learning rate of what was learned between two checkpoints had been multiplied by w_j. The number of a
checkpoint counts, not its step, as in the paper and in Megatron-LM: the steps should be evenly spaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mergebench.errors import RecipeError, did_you_mean
from mergebench.parameters import Parameter
from mergebench.recipe.positions import show

Weights = list[float]
DECAY = Parameter("decay", float, 0.8, "what the average keeps of itself at each checkpoint", low=0, below=1)


def linear_decay(x: float) -> float:
    """1 - x."""
    return 1 - x


def cosine_decay(x: float) -> float:
    """(1 + cos(pi x)) / 2."""
    return (1 + math.cos(math.pi * x)) / 2


def minus_sqrt_decay(x: float) -> float:
    """1 - sqrt(x)."""
    return 1 - math.sqrt(x)


CURVES: dict[str, Callable[[float], float]] = {
    "cosine": cosine_decay, "linear": linear_decay, "minus-sqrt": minus_sqrt_decay,
}  # fmt: skip


def mean(n: int) -> Weights:
    """c_j = 1 / n: the simple average of arXiv:2505.12082, eq. 3; LAWA (arXiv:2209.14981), the style `linear` of
    Megatron-LM. As a decay it is the linear one, w_j = 1 - j / n."""
    return [1 / n] * n


def ema(n: int, decay: float = DECAY.default) -> Weights:
    """c_j = (1 - decay) decay^(k - j), and decay^k for the first: arXiv:2505.12082, eq. 4, with decay = 1 - alpha.

    The paper tries alpha 0.1 and 0.2, of which 0.2 did better early in training.
    """
    return [decay ** (n - 1), *((1 - decay) * decay ** (n - 1 - j) for j in range(1, n))]


def wsm(n: int, decay: str | Sequence[float]) -> Weights:
    """c_0 = 1 - w_1, c_j = w_j - w_(j+1), c_k = w_k: WSM, arXiv:2507.17634, its theorem solved for the weights.

    decay: w_1, ..., w_k, from 1 to 0, or a curve f with w_j = f(j / n). That the curve reaches zero one interval after
    the last checkpoint is Megatron-LM's choice; the cosine as the default is ours.
    """
    factors = [CURVES[decay](j / n) for j in range(1, n)] if isinstance(decay, str) else list(decay)
    ends = [1.0, *factors, 0.0]
    return [ends[j] - ends[j + 1] for j in range(n)]


def minus_sqrt(n: int) -> Weights:
    """w_j = 1 - sqrt(j / n): the style `minus-sqrt` of Megatron-LM (pull request 5114), WSM with this curve."""
    return wsm(n, "minus-sqrt")


DEFAULTS = {"ema": DECAY.default, "wsm": "cosine"}
NAMES = ("mean", "ema", "wsm", "minus-sqrt")
FORM = "write schedule: mean, ema, wsm, minus-sqrt, {ema: {decay: 0.9}}, {wsm: {decay: linear}} or {weights: [1, 2, 3]}"


@dataclass(frozen=True)
class Schedule:
    """How the checkpoints are weighted."""

    name: str  # of NAMES, or weights
    value: Any = None  # the decay, or the weights

    @property
    def label(self) -> str:
        """`ema, decay 0.8`."""
        if self.value is None or self.name == "weights":
            return self.name
        return f"{self.name}, decay {list(self.value) if isinstance(self.value, tuple) else self.value}"

    def weights(self, n: int) -> Weights:
        """The weights of n checkpoints by their steps; `RecipeError` if it is written for another number."""
        if self.name == "weights":
            self._check_count(len(self.value), n, "weights")
            return [one / sum(self.value) for one in self.value]
        if self.name == "ema":
            return ema(n, self.value)
        if self.name == "wsm":
            if isinstance(self.value, tuple):
                self._check_count(len(self.value) + 1, n, "factors, one for each interval between two,")
            return wsm(n, self.value)
        return mean(n) if self.name == "mean" else minus_sqrt(n)

    def _check_count(self, given: int, n: int, what: str) -> None:
        if given != n:
            raise RecipeError(f"{len(self.value)} {what} for {n} checkpoints", FORM)

    def to_plain(self) -> Any:
        """As it is written in a recipe."""
        if self.value is None:
            return self.name
        value = list(self.value) if isinstance(self.value, tuple) else self.value
        return {self.name: value if self.name == "weights" else {"decay": value}}


def read(written: Any) -> Schedule:
    """A schedule as it is written in a recipe; `RecipeError` if it is none."""
    if isinstance(written, str):
        if written not in NAMES:
            hint = "give them: schedule: {weights: [1, 2, 3]}" if written == "weights" else did_you_mean(written, NAMES)
            raise RecipeError(f"'{written}' is no schedule", hint)
        return Schedule(written, DEFAULTS.get(written))
    if not (isinstance(written, dict) and len(written) == 1):
        raise RecipeError(f"must be a schedule, got {show(written)}", FORM)
    ((name, given),) = written.items()
    if name == "weights":
        return Schedule(name, _weights(given))
    if name not in NAMES or not isinstance(given, dict) or given.keys() - {"decay"}:
        raise RecipeError(f"{name}: no such schedule, or no such parameter of it", FORM)
    if "decay" not in given or given["decay"] is None:
        return Schedule(name, DEFAULTS.get(name))
    if name == "wsm":
        return Schedule(name, _decay(given["decay"]))
    if name != "ema":
        raise RecipeError(f"'{name}' has no decay", FORM)
    complaint = DECAY.complaint(given["decay"])
    if complaint is not None:
        raise RecipeError(f"ema.decay: {complaint}, got {show(given['decay'])}", DECAY.help)
    return Schedule(name, float(given["decay"]))


def _weights(given: Any) -> tuple[float, ...]:
    if not _numbers(given):
        raise RecipeError(f"weights: must be a list of numbers, got {show(given)}", FORM)
    if abs(sum(given)) < 1e-8:
        raise RecipeError("weights: they add up to zero", "they are divided by their sum")
    return tuple(map(float, given))


def _decay(given: Any) -> str | tuple[float, ...]:
    if isinstance(given, str) and given in CURVES:
        return given
    if not _numbers(given):
        raise RecipeError(f"wsm.decay: must be {', '.join(CURVES)} or a list of factors, got {show(given)}", FORM)
    falls = all(1 >= one >= other >= 0 for one, other in zip([1, *given], [*given, 0], strict=True))
    if not falls:
        raise RecipeError("wsm.decay: the factors of a decay fall, from 1 at most to 0 at least", FORM)
    return tuple(map(float, given))


def _numbers(given: Any) -> bool:
    each = given if isinstance(given, list) else [None]
    return bool(each) and all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in each)
