"""A trial of a merge method: chosen parameters, small checkpoints of two stored types, merges by the engine."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench.engine.context import Context
from mergebench.engine.method import Method
from mergebench.engine.noise import TILE
from mergebench.errors import MergebenchError
from mergebench.parameters import Parameter
from mergebench.testing.checks import Broken, Inapplicable
from mergebench.testing.methods import Bench, Tensors, in_memory

SHAPES = {"matrix": (13, 11), "vector": (23,), "scalar": ()}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
GRID = 2**-8  # a step that bfloat16 resolves below 1: sums and differences on it are exact


class Trial:
    """A method, and merges with it."""

    def __init__(self, method: Method, place: Path) -> None:
        self.method, self.place, self._numbers = method, place, itertools.count()

    def count(self, usual: int) -> int:
        return self.method.models or usual

    def params(self, count: int, chosen: Mapping[str, float], weights: Sequence[float] = (), **more: Any) -> Any:
        """The defaults, except those `chosen` by name, weights and `more`; required parameters get an allowed value."""
        values: dict[str, Any] = {}
        for name, parameter in self.method.parameters.items():
            value = _allowed(parameter) if parameter.required else parameter.default
            if name in more or (name in chosen and parameter.complaint(chosen[name]) is None):
                value = more.get(name, chosen.get(name))
            values[name] = (value,) * count if parameter.per_model else value
        if self.weighted and weights:
            values["weight"] = tuple(weights)
        return self.method.make_params(values)

    @property
    def weighted(self) -> bool:
        return "weight" in self.method.parameters and self.method.parameters["weight"].per_model

    def merge(self, base: Tensors, models: Sequence[Tensors], params: Any, must: bool = False) -> dict[str, Tensor]:
        """Merge by the engine. If the method refuses the input, the check is inapplicable, unless the method `must`
        accept it."""
        bench = Bench(self.method, params, base, models, self.place / str(next(self._numbers)))
        try:
            return bench.streamed(bench.opened, TILE, 1)
        except MergebenchError as error:
            try:
                found = in_memory(self.method, base, models, params)
            except MergebenchError as refusal:
                if must:
                    raise Broken("refused", refusal.message) from None
                raise Inapplicable(refusal.message) from None
            for name, value in found.items():
                check_finite(name, value)
            raise Broken("error", error.message) from None

    def is_linear(self, params: Any, count: int) -> bool:
        """Whether the method is a linear function of its input."""
        origin: dict[str, Tensor] = {name: torch.zeros(value.shape) for name, value in make_base().items()}
        one, two = ([moved(origin, seed, 1.0) for seed in range(first, first + count)] for first in (20, 40))
        both = [{name: a[name] + 2 * b[name] for name in a} for a, b in zip(one, two, strict=True)]
        try:
            left, right, whole = (in_memory(self.method, origin, values, params) for values in (one, two, both))
        except MergebenchError:  # the method refuses some values
            return False
        return all(torch.allclose(whole[name], left[name] + 2 * right[name], 1e-4, 1e-4) for name in whole)

    def draws(self, params: Any, count: int) -> bool:
        """Whether the method draws random numbers."""
        drawn: list[bool] = []

        class Watched(Context):
            def bernoulli(self, shares: Any) -> Tensor:
                drawn.append(True)
                return super().bernoulli(shares)

        def watched(values: Tensor, params: Any, context: Context) -> Any:
            fields = {field.name: getattr(context, field.name) for field in dataclasses.fields(context)}
            return self.method.function(values, params, Watched(**fields))

        base = make_base()
        models = [moved(base, seed) for seed in range(count)]
        try:
            in_memory(dataclasses.replace(self.method, function=watched), base, models, params)
        except MergebenchError as refusal:
            raise Inapplicable(refusal.message) from None
        return bool(drawn)


def _allowed(parameter: Parameter) -> Any:
    """A value for a parameter that has no default."""
    if parameter.choices or parameter.type is bool:
        return parameter.choices[0] if parameter.choices else False
    if parameter.type is str:
        raise Inapplicable(f"'{parameter.name}' has no default, and any word may be one")
    low = parameter.low if parameter.above is None else parameter.above
    if parameter.type is int:
        return max(1, math.ceil(low or 0))
    if low is None:
        return 1.0 if parameter.high is None else parameter.high
    return low + (0.05 if parameter.high is None else 0.3 * (parameter.high - low))  # the middle may be special


def make_base() -> dict[str, Tensor]:
    """A base whose elements lie between 0.6 and 0.9, or -0.9 and -0.6, on the grid."""
    random, base = torch.Generator().manual_seed(7), {}
    for dtype, (name, shape) in itertools.product(DTYPES, SHAPES.items()):
        signs = torch.randint(0, 2, shape, generator=random) * 2 - 1
        base[f"{dtype}.{name}"] = (signs * torch.randint(160, 224, shape, generator=random) * GRID).to(DTYPES[dtype])
    return base


def moved(base: Tensors, seed: int, by: float = 0.03) -> dict[str, Tensor]:
    """The base with half of its elements moved, off the grid if the stored type allows."""
    random, result = torch.Generator().manual_seed(seed), {}
    for name, value in base.items():
        step = torch.randn(value.shape, generator=random) * (torch.rand(value.shape, generator=random) > 0.5)
        step = step if value.shape else step.abs()  # opposite directions of single numbers would cancel
        result[name] = (value.float() + by * step).to(value.dtype)
    return result


def check_finite(name: str, value: Tensor) -> None:
    bad = value[~torch.isfinite(value)]
    if len(bad):
        raise Broken("not finite", f"{name} holds {bad[0].item()}")
