"""What transformers knows of an architecture from its config: which tensors it reads, and which share their values.

The model is built without memory for its weights. This takes seconds, so that it is done only for tensors that one
model stores and another does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from mergebench.checkpoint.documents import parse_json
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.layouts import build

_KNOWN = 0.75  # share of a file's tensors that the model must have under their names, to be believed about the others


class Architecture(NamedTuple):
    """A model's tensors and ties, by its names for them."""

    prefix: str  # of the model without its head
    stored: frozenset[str]  # what a file of it holds, tied tensors included
    ties: Mapping[str, str]  # an alias -> the tensor whose values it has
    derived: frozenset[str]  # buffers that no file of it holds
    passed_over: tuple[str, ...]  # patterns of names in old files

    def find(self, name: str) -> str | None:
        """The model's name of a tensor in a file."""
        return next((one for one in self._names(name) if one in self.stored), None)

    def passes_over(self, name: str) -> bool:
        """Whether it does not read a tensor of a file, and says so."""
        if self.find(name) is not None:
            return False
        derived = any(one in self.derived for one in self._names(name))
        return derived or any(re.search(pattern, name) for pattern in self.passed_over)

    def _names(self, name: str) -> tuple[str, ...]:
        return name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}.")


class Facts:
    """What is known of a file's tensors that another file lacks."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        self._config, self._tensors = config, tensors

    @cached_property
    def _architecture(self) -> Architecture | None:
        found = _of(json.dumps(dict(self._config), sort_keys=True)) if self._config.get("architectures") else None
        if found is None:
            return None
        known = sum(found.find(name) is not None for name in self._tensors)
        return found if known >= _KNOWN * len(self._tensors) else None

    def idle(self, info: TensorInfo) -> bool:
        """Whether a tensor is no weight: not a float, a mask, or one that the architecture does not read."""
        if not info.is_float or _is_mask(info):
            return True
        return self._architecture is not None and self._architecture.passes_over(info.name)

    def tied_to(self, name: str, tensors: Iterable[str]) -> str | None:
        """The one of `tensors` whose values a tensor has, if it is an alias."""
        known = self._architecture
        own = known.find(name) if known is not None else None
        if known is None or own is None or own not in known.ties:
            return None
        target = known.ties[own]
        return next((one for one in tensors if known.find(one) == target), None)

    def apart(self, name: str) -> bool:
        """Whether the architecture is known, and shares this tensor's values with no other."""
        known, tied = self._architecture, {*self.aliases, *self.aliases.values()}
        return known is not None and known.find(name) is not None and name not in tied

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Every name that shares its values with a tensor of the file, stored or not, and that tensor."""
        known = self._architecture
        if known is None:
            return {}
        stored = {known.find(name): name for name in self._tensors}
        shared: dict[str, list[str]] = {}  # the tied one first
        for alias, target in known.ties.items():
            shared.setdefault(target, [target]).append(alias)
        found: dict[str, str] = {}
        for names in shared.values():
            first = next((name for name in names if name in stored), None)
            found |= {stored.get(name, name): stored[first] for name in names if first is not None and name != first}
        return found


def _is_mask(info: TensorInfo) -> bool:
    """[1, 1, n, n], which positions see which: never the shape of a weight."""
    one, other, *sides = info.shape if len(info.shape) == 4 else (0, 0)
    return one == other == 1 and sides[0] == sides[1] > 1 and not info.name.endswith(".weight")


@lru_cache(maxsize=8)
def _of(config: str) -> Architecture | None:
    """The architecture of a config.json; None if transformers does not have it."""
    model = build(parse_json(config))
    if model is None:
        return None
    try:
        stored = frozenset(model.state_dict())
        derived = frozenset(name for name, _ in model.named_buffers()) - stored
        ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    except Exception:  # of a model whose ties it cannot say, nothing is known
        return None
    passed_over = tuple(model._keys_to_ignore_on_load_unexpected or ())
    return Architecture(model.base_model_prefix, stored, ties, derived, passed_over)
