"""Parameter values that vary over a model, as in mergekit's configs.

    t: 0.3                                     one value
    t: [0, 0.5, 1]                             a gradient: from the first layer to the last, linear between (or rounded)
    t: [{filter: mlp, value: 0.2}, {value: 1}] the first entry whose filter fits the tensor's name

A filter is a part of the name, a glob (with `*`, `?` or `[`) or a regular expression between slashes. An
entry's value may be a gradient. Tensors outside the layers (embeddings, final norm, head) take a gradient's
first value.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import Any

from mergebench.checkpoint.names import layer_of

_GLOB = re.compile(r"[*?[]")


def varies(value: Any) -> bool:
    return isinstance(value, list)


def scalars(value: Any) -> list[Any]:
    """Every single value in `value`."""
    if not varies(value):
        return [value]
    return [one for item in value for one in scalars(item["value"] if isinstance(item, dict) else item)]


def value_at(value: Any, name: str, depth: float) -> Any:
    """The value for the tensor `name`, at `depth` (0 to 1) between the first and the last layer; None if there is
    none."""
    if not varies(value):
        return value
    if isinstance(value[0], dict):
        fitting = (value_at(item["value"], name, depth) for item in value if fits(item.get("filter"), name))
        return next((one for one in fitting if one is not None), None)
    if isinstance(value[0], (bool, str)):
        return value[int(depth * (len(value) - 1))]
    place = depth * (len(value) - 1)
    first = int(place)
    share = place - first
    return (1 - share) * value[first] + share * value[min(first + 1, len(value) - 1)]


def fits(pattern: str | None, name: str) -> bool:
    """Whether a filter fits a tensor's name."""
    if pattern is None or pattern == "*":
        return True
    if len(pattern) > 1 and pattern[0] == pattern[-1] == "/":
        return re.search(pattern[1:-1], name) is not None
    return fnmatch.fnmatchcase(name, pattern) if _GLOB.search(pattern) else pattern in name


def depths(names: Iterable[str]) -> dict[str, float]:
    """How far each tensor's layer is from the first (0) to the last (1) of its stack; a single layer is the last."""
    layers = {name: layer for name in names if (layer := layer_of(name)) is not None}
    last: dict[str, int] = {}
    for stack, number, _ in layers.values():
        last[stack] = max(last.get(stack, 0), number)
    return {name: number / last[stack] if last[stack] else 1.0 for name, (stack, number, _) in layers.items()}
