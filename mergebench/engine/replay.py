"""Run a merge method on rows in memory: no files, no workers, no shards."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mergebench.engine.context import Context
from mergebench.engine.method import Method, Tasks
from mergebench.engine.noise import TILE
from mergebench.engine.span import Span
from mergebench.engine.statistics import OrderStatistics, Statistic, decode, pick

CHUNK = 2 * TILE  # elements that stay in a core's cache


def run_at_once(
    method: Method, values: Tensor, params: Any, context: Context, answer: Callable[[Statistic], Any]
) -> Tensor:
    """The method's result on `values` [models, elements] as one chunk; `answer` answers its questions.

    For a method with a model per task: the shared vector.
    """
    answers: list[Any] = []
    while True:
        result = replay(method, values, params, context, answers)
        if isinstance(result, Statistic):
            answers.append(answer(result))
        else:
            return result.vector if isinstance(result, Tasks) else result


def ask_at_once(
    method: Method, values: Tensor, params: Any, context: Context, answers: Sequence[Mapping[str, Any]], questions: int
) -> list[dict[str, Any]]:
    """The answers after `answers` to the first `questions` questions of a method about the tensor `values`, of one
    tile at most: encoded, with remarks."""
    running: Any = method(values, params, context)
    statistic, found = next(running), []
    for number in range(questions):
        if number < len(answers):
            answer = answers[number]
        else:
            found.append(statistic.at_once())
            answer = found[-1]
        if number + 1 < questions:
            statistic = running.send(decode(answer, values.device))
    return found


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
    method: Method, values: Tensor, params: Any, context: Context, answers: Sequence[Any]
) -> Statistic | Tensor | Tasks:
    """The method's next question after these answers, or its result."""
    running: Any = method(values, params, context)
    if not inspect.isgenerator(running):
        return cast("Tensor | Tasks", running)
    steps = cast("Generator[Statistic, Any, Tensor]", running)
    try:
        statistic = next(steps)
        for answer in answers:
            statistic = steps.send(answer)
        return statistic
    except StopIteration as end:
        return cast("Tensor | Tasks", end.value)
