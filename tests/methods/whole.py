"""Run a built-in method on rows that are all there is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mergebench import methods
from mergebench.engine.context import Context
from mergebench.engine.span import Span
from mergebench.testing.methods import run_whole


def whole(
    method_name: str,
    rows: Tensor,
    scope: str = "tensor",
    name: str = "w",
    shape: tuple[int, ...] | None = None,
    **values: Any,
) -> Tensor:
    """What a method makes of `rows` [models, elements], all of the tensor `name`.

    values: parameters by the recipe's names.
    """
    method, found = methods.get(method_name), {}
    for parameter in method.parameters.values():
        value = values.get(parameter.name, parameter.default)
        found[parameter.name] = (value,) * len(rows) if parameter.per_model and not isinstance(value, tuple) else value
    context = context_of(rows, scope, name, shape)
    return run_whole(method, rows, method.make_params(found), context, [rows.shape[1]])


def context_of(rows: Tensor, scope: str = "tensor", name: str = "w", shape: tuple[int, ...] | None = None) -> Context:
    models, numel = rows.shape
    names = tuple(f"ft{number}" for number in range(models))
    return Context(
        numel, names, (Span(name, 0, numel),), (numel,) if shape is None else shape, scope, 0, torch.device("cpu")
    )
