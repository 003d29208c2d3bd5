"""Find a method's questions by running it on a toy chunk: the questions do not depend on the data."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Generator, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mergebench.engine.context import Context
from mergebench.engine.job import Merge
from mergebench.engine.on_data import toy as on_data_of
from mergebench.engine.span import Span
from mergebench.engine.statistics import Norms, OrderStatistics, Statistic
from mergebench.errors import MergebenchError, RecipeError
from mergebench.plugins import failed_at


def asked(merge: Merge, params: Any, looked: set[str] | None = None) -> list[Any]:
    """The method's questions with these parameters. One entry a question: its ranks, or the sort of sum.

    looked: receives the fields of the context that the method read.
    """
    return [kind for kind, _ in _trace(merge, params, looked=looked)]


def read_for(merge: Merge, params: Any) -> list[frozenset[str]]:
    """For each question, the parameters that the method read before asking; it depends on no others."""
    read: set[str] = set()
    return [so_far for _, so_far in _trace(merge, _watched(params, read), read)]


def _trace(
    merge: Merge, params: Any, read: Iterable[str] = (), looked: set[str] | None = None
) -> list[tuple[Any, frozenset[str]]]:
    """Each question, and what has been `read` so far."""
    try:
        return _questions(merge, params, read, looked)
    except MergebenchError:
        raise
    except Exception as error:
        at = failed_at(merge.method.written, error)
        if at is None:  # ours
            raise
        raise at from None


def _questions(
    merge: Merge, params: Any, read: Iterable[str], looked: set[str] | None
) -> list[tuple[Any, frozenset[str]]]:
    method = merge.method
    values, context = toy(merge)
    context = context if looked is None else _watched(context, looked)
    running = method(values, params, context)
    if not inspect.isgenerator(running):
        return []
    steps = cast("Generator[Statistic, Any, Tensor]", running)
    found: list[tuple[Any, frozenset[str]]] = []
    try:
        statistic = next(steps)
        while True:
            # ranks are sampled (at rows of one length), sums are taken over whole tiles
            other = "tensor" if not isinstance(statistic, OrderStatistics) else "row"
            if merge.cut not in ("element", other) or (merge.cut == "row" and merge.scope == "model"):
                what = type(statistic).__name__
                raise TypeError(f"{method.name}: {what} cannot be asked with cut='{merge.cut}', scope '{merge.scope}'")
            if any(kind is Norms for kind, _ in found):
                raise TypeError(f"{method.name}: norms reach over all tensors, they can only be asked last")
            kind = statistic.ranks if isinstance(statistic, OrderStatistics) else type(statistic)
            answer = statistic.exact()
            found.append((kind, frozenset(read)))
            statistic = steps.send(answer)
    except StopIteration:
        return found


def _watched(record: Any, read: set[str]) -> Any:
    """A copy of a method's parameters, or of a context, that records in `read` which fields are accessed."""
    names = {field.name for field in dataclasses.fields(record)}

    class Watched(type(record)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            read.update(names if name == "__dict__" else names & {name})
            return super().__getattribute__(name)

    copy = object.__new__(Watched)
    for name in names:
        object.__setattr__(copy, name, getattr(record, name))
    return copy


def toy(merge: Merge, shape: tuple[int, ...] = (61,)) -> tuple[Tensor, Context]:
    """A small tensor of each model, and its context."""
    models, numel = len(merge.models), math.prod(shape)
    values = torch.sin(torch.arange(1.0, models * numel + 1)).reshape(models, numel) * 0.01
    spans = (Span("toy", 0, numel),)
    cpu = torch.device("cpu")
    on_data = on_data_of(merge, shape, numel, cpu)
    return values, Context(numel, merge.names, spans, shape, merge.scope, merge.seed, cpu, on_data)


def count(merge: Merge, merged: Sequence[str]) -> tuple[dict[str, int], bool, bool]:
    """The number of questions about each tensor, whether the last is about all together, and whether the method may
    see several tensors as one: at scope tensor it asks nothing, and it reads the size and the shape of none.

    At scope model, all tensors must have the same questions.
    """
    known: dict[int, list[Any]] = {}
    looked: set[str] = set()
    for name in merged:
        params = merge.params_for(name)
        if id(params) not in known:
            known[id(params)] = asked(merge, params, looked)
    kinds = list(known.values())
    if merge.scope == "model" and any(kind != kinds[0] for kind in kinds):
        raise RecipeError(
            f"scope: model: '{merge.method.name}' asks about the whole model at once, what it asks varies here",
            "give a density one value, or use scope: tensor",
        )
    blind = merge.cut == "element" and "shape" not in looked
    blind = blind and (merge.scope == "model" or not (any(kinds) or "numel" in looked))
    asks = {name: len(known[id(merge.params_for(name))]) for name in merged}
    return asks, any(Norms in kind for kind in kinds), blind
