"""A LoRA directory on top of a base: differences by the names of the base's files.

    delta W = scale * B @ A,  scale = alpha / r  (alpha / sqrt(r) for rsLoRA)

with A [r, in] and B [out, r] (arXiv:2106.09685; rsLoRA arXiv:2312.03732). DoRA (arXiv:2402.09353)
then gives each output row a trained norm m:

    W' = m * (W + delta W) / |W + delta W|

Neither is ever written out as a full model: the engine computes the rows it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from mergebench.checkpoint.adapter import Adapter, is_adapter, read_adapter
from mergebench.checkpoint.header import Header, TensorInfo
from mergebench.checkpoint.names import match
from mergebench.errors import ModelError

_OTHER_MODEL = "this adapter was trained on another model: name that one before the '+'"


@dataclass(frozen=True)
class LowRank:
    """scale * B @ A for one tensor; `transposed` where the base stores it [in, out] (GPT-2's Conv1D)."""

    a: TensorInfo | None  # None: B is a vector, the difference of a bias
    b: TensorInfo
    scale: float
    transposed: bool = False
    magnitude: TensorInfo | None = None  # DoRA's row norms, which need the base's rows
    base: TensorInfo | None = None


class Changes(NamedTuple):
    """What an adapter does to a base, by the base's names."""

    low_rank: dict[str, LowRank]
    whole: dict[str, TensorInfo]  # in the base's place
    header: Header


def read_lora(directory: Path, base: Mapping[str, TensorInfo]) -> Changes:
    """What a LoRA directory changes.

    Raises `ModelError` where the adapter does not belong to this base or is of a kind not supported.
    """
    adapter = read_adapter(directory)
    names = Names(adapter, base)
    deltas: dict[str, LowRank] = {}
    for module, factors in adapter.modules.items():
        name = names.find(f"{module}.weight")
        if name in deltas:
            raise ModelError(f"{directory}: {module}: a second pair of factors for '{name}'")
        shape = factors.shape[::-1] if adapter.transposed else factors.shape
        _check(adapter, module, shape, base[name])
        dora = base[name] if factors.magnitude is not None else None
        deltas[name] = LowRank(factors.a, factors.b, factors.scale, adapter.transposed, factors.magnitude, dora)
        if factors.bias is not None:
            bias = names.find(f"{module}.bias")
            _check(adapter, module, factors.bias.shape, base[bias])
            deltas[bias] = LowRank(None, factors.bias, factors.scale)
    whole: dict[str, TensorInfo] = {}
    for stored, tensor in adapter.whole.items():
        name = names.find(stored)
        if name in whole or name in deltas:
            raise ModelError(f"{directory}: {tensor.name}: '{name}' is changed twice")
        _check(adapter, stored, tensor.shape, base[name])
        whole[name] = tensor._replace(name=name)
    if adapter.config.get("bias", "none") != "none":
        for name in [f"{name.removesuffix('.weight')}.bias" for name in deltas]:
            if name in base and name not in whole and name not in deltas:
                raise ModelError(f"{directory}: bias: {adapter.config['bias']}, but it holds no '{name}'")
    return Changes(deltas, whole, adapter.header)


class Names:
    """The base's names for what an adapter changes.

    It may have been trained on a model whose class adds or drops a prefix (`model.`, `bert.`), or whose version
    calls its parts otherwise.
    """

    def __init__(self, adapter: Adapter, base: Mapping[str, TensorInfo]) -> None:
        self._adapter, self._base = adapter, base

    def find(self, name: str) -> str:
        """The base tensor that goes by `name`."""
        if name in self._base:
            return name
        ends: list[str] = [*self._longer.get(name, ()), *(end for end in _ends(name) if end in self._base)]
        if len(ends) == 1:
            return ends[0]
        if name not in self._matched:
            raise ModelError(f"{self._adapter.directory}: the base has no tensor '{name}' to adapt", _OTHER_MODEL)
        return self._matched[name]

    @cached_property
    def _longer(self) -> dict[str, list[str]]:
        """The base's names by their ends."""
        found: dict[str, list[str]] = {}
        for name in self._base:
            for end in _ends(name):
                found.setdefault(end, []).append(name)
        return found

    @cached_property
    def _matched(self) -> dict[str, str]:
        shapes = {name: tensor.shape for name, tensor in self._adapter.whole.items()}
        for module, factors in self._adapter.modules.items():
            shapes[f"{module}.weight"] = factors.shape[::-1] if self._adapter.transposed else factors.shape
            if factors.bias is not None:
                shapes[f"{module}.bias"] = factors.bias.shape
        return match(shapes, self._base)


def _ends(name: str) -> Iterator[str]:
    """`b.c` and `c` of `a.b.c`."""
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _check(adapter: Adapter, what: str, shape: tuple[int, ...], target: TensorInfo) -> None:
    if shape != target.shape:
        raise ModelError(
            f"{adapter.directory}: {what}: the adapter changes {list(shape)}, base has {list(target.shape)}",
            _OTHER_MODEL,
        )
    if not target.is_float:
        raise ModelError(f"{adapter.directory}: {what}: base has it as {target.dtype}: only floats can be adapted")


__all__ = ["LowRank", "Names", "is_adapter", "read_lora"]
