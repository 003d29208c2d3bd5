"""What a method asks, learnt on a toy chunk: it asks the same whatever the data."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mergebench.engine.context import Context, Span
from mergebench.engine.merge import Merge
from mergebench.engine.statistics import Norms, OrderStatistics, Statistic
from mergebench.errors import RecipeError


def asked(merge: Merge, params: Any) -> list[Any]:
    """What the method asks with these parameters. One entry a question: its ranks, or the sort of sum."""
    numel, method = 61, merge.method
    toy = torch.sin(torch.arange(1.0, len(merge.models) * numel + 1)).reshape(len(merge.models), numel) * 0.01
    spans = (Span("toy", 0, numel),)
    context = Context(numel, merge.names, spans, (numel,), merge.scope, merge.seed, torch.device("cpu"))
    running = method(toy, params, context)
    if not inspect.isgenerator(running):
        return []
    steps = cast("Generator[Statistic, Any, Tensor]", running)
    found: list[Any] = []
    try:
        statistic = next(steps)
        while True:
            # ranks are sampled (at rows of one length), sums are taken over whole tiles
            other = "tensor" if not isinstance(statistic, OrderStatistics) else "row"
            if merge.cut not in ("element", other) or (merge.cut == "row" and merge.scope == "model"):
                kind = type(statistic).__name__
                raise TypeError(f"{method.name}: {kind} cannot be asked with cut='{merge.cut}', scope '{merge.scope}'")
            if Norms in found:
                raise TypeError(f"{method.name}: norms reach over all tensors, they can only be asked last")
            found.append(statistic.ranks if isinstance(statistic, OrderStatistics) else type(statistic))
            statistic = steps.send(statistic.exact())
    except StopIteration:
        return found


def count(merge: Merge, merged: Sequence[str]) -> tuple[dict[str, int], bool]:
    """How many questions are asked about each tensor, and whether the last is about all together.

    At scope model they must be the same about all.
    """
    known: dict[int, list[Any]] = {}
    for name in merged:
        params = merge.params_for(name)
        if id(params) not in known:
            known[id(params)] = asked(merge, params)
    kinds = list(known.values())
    if merge.scope == "model" and any(kind != kinds[0] for kind in kinds):
        raise RecipeError(
            f"scope: model: '{merge.method.name}' asks about the whole model at once, what it asks varies here",
            "give a density one value, or use scope: tensor",
        )
    return {name: len(known[id(merge.params_for(name))]) for name in merged}, any(Norms in kind for kind in kinds)
