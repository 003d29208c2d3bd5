"""Run a merge method on rows in memory: no files, no workers, no shards."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Generator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mergebench.engine.context import Context
from mergebench.engine.method import Method, Tasks
from mergebench.engine.noise import TILE
from mergebench.engine.span import Span
from mergebench.engine.statistics import OrderStatistics, Statistic, pick

CHUNK = 2 * TILE  # elements that stay in a core's cache


def run_at_once(
    method: Method, values: Tensor, params: Any, context: Context, answer: Callable[[Statistic], Any]
) -> Tensor:
    """The method's result on `values` [models, elements] as one chunk; `answer` answers its questions.

    For a method with a model per task: the shared vector.
    """
    result = replay(method, values, params, context, (), answer)
    assert not isinstance(result, Statistic)
    return result.vector if isinstance(result, Tasks) else result


def run_in_chunks(method: Method, values: Tensor, params: Any, context: Context, chunk: int = CHUNK) -> Tensor:
    """As `run_at_once`, with equal bits, but in chunks with less memory; for methods that may be cut anywhere.

    values: all elements of the one tensor in `context.spans`.
    """
    numel, name = values.shape[1], context.spans[0].tensor
    out = torch.empty(numel)
    answers: list[Any] = []
    while True:
        question: Statistic | None = None
        state: Any = None
        for start in range(0, numel, chunk):
            piece = values[:, start : start + chunk].contiguous()
            stop = start + piece.shape[1]
            here = dataclasses.replace(context, spans=(Span(name, start, stop),))
            result = replay(method, piece, params, here, answers)
            assert not isinstance(result, Tasks)
            if isinstance(result, Tensor):
                out[start:stop] = result
            elif isinstance(result, OrderStatistics):
                question, state = result, np.empty(values.shape, np.float32) if state is None else state
                state[:, start:stop] = result.keyed()
            else:
                question = result
                state = result.init(numel, -(-numel // TILE), None, 0) if state is None else state
                result.reduce(state, start // TILE)
        if question is None:
            return out
        ordered = isinstance(question, OrderStatistics)
        answers.append(pick(state, cast(OrderStatistics, question).ranks) if ordered else question.finish(state))


def replay(
    method: Method,
    values: Tensor,
    params: Any,
    context: Context,
    answers: Sequence[Any],
    answer: Callable[[Statistic], Any] | None = None,
) -> Statistic | Tensor | Tasks:
    """The method's next question after these answers, or its result; `answer` answers the questions after them."""
    running: Any = method(values, params, context)
    if not inspect.isgenerator(running):
        return cast("Tensor | Tasks", running)
    steps = cast("Generator[Statistic, Any, Tensor]", running)
    try:
        statistic = next(steps)
        for known in answers:
            statistic = steps.send(known)
        while answer is not None:
            statistic = steps.send(answer(statistic))
        return statistic
    except StopIteration as end:
        return cast("Tensor | Tasks", end.value)
