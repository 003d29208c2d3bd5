"""Run a merge method on rows that are all there is: small enough for memory, no files, no sweeps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import Any, cast

from torch import Tensor

from mergebench.engine.context import Context
from mergebench.engine.method import Method
from mergebench.engine.statistics import Statistic


def run_in_memory(
    method: Method,
    values: Tensor,
    params: Any,
    context: Context,
    answer: Callable[[Statistic], Any] = lambda statistic: statistic.exact(),
) -> Tensor:
    """What the method makes of `values` [models, elements]; `answer` answers its questions."""
    running: Any = method(values, params, context)
    if not inspect.isgenerator(running):
        return cast(Tensor, running)
    steps = cast("Generator[Statistic, Any, Tensor]", running)
    try:
        statistic = next(steps)
        while True:
            statistic = steps.send(answer(statistic))
    except StopIteration as end:
        return cast(Tensor, end.value)
