"""A LoRA directory on top of a base: differences by the names of the base's files.

    delta W = scale * B @ A,  scale = alpha / r  (alpha / sqrt(r) for rsLoRA)

with A [r, in] and B [out, r] (arXiv:2106.09685; rsLoRA arXiv:2312.03732). DoRA (arXiv:2402.09353)
then gives each output row a trained norm m:

    W' = m * (W + delta W) / |W + delta W|

Neither is ever written out as a full model: the engine computes the rows it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mergebench.checkpoint.adapter import Adapter, is_adapter, read_adapter
from mergebench.checkpoint.header import Header, TensorInfo
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
    deltas: dict[str, LowRank] = {}
    for module, factors in adapter.modules.items():
        name = base_name(directory, f"{module}.weight", base)
        if name in deltas:
            raise ModelError(f"{directory}: {module}: a second pair of factors for '{name}'")
        shape = factors.shape[::-1] if adapter.transposed else factors.shape
        _check(adapter, module, shape, base[name])
        dora = base[name] if factors.magnitude is not None else None
        deltas[name] = LowRank(factors.a, factors.b, factors.scale, adapter.transposed, factors.magnitude, dora)
        if factors.bias is not None:
            bias = base_name(directory, f"{module}.bias", base)
            _check(adapter, module, factors.bias.shape, base[bias])
            deltas[bias] = LowRank(None, factors.bias, factors.scale)
    whole: dict[str, TensorInfo] = {}
    for stored, tensor in adapter.whole.items():
        name = base_name(directory, stored, base)
        if name in whole or name in deltas:
            raise ModelError(f"{directory}: {tensor.name}: '{name}' is changed twice")
        _check(adapter, stored, tensor.shape, base[name])
        whole[name] = tensor._replace(name=name)
    if adapter.config.get("bias", "none") != "none":
        for name in [f"{name.removesuffix('.weight')}.bias" for name in deltas]:
            if name in base and name not in whole and name not in deltas:
                raise ModelError(f"{directory}: bias: {adapter.config['bias']}, but it holds no '{name}'")
    return Changes(deltas, whole, adapter.header)


def base_name(directory: Path, name: str, base: Mapping[str, TensorInfo]) -> str:
    """The base tensor that goes by `name`.

    The adapter may have been trained on a model whose class adds or drops a prefix (`model.`, `bert.`).
    """
    if name in base:
        return name
    ends = [known for known in base if known.endswith(f".{name}") or name.endswith(f".{known}")]
    if len(ends) != 1:
        raise ModelError(f"{directory}: the base has no tensor '{name}' to adapt", _OTHER_MODEL)
    return ends[0]


def _check(adapter: Adapter, what: str, shape: tuple[int, ...], target: TensorInfo) -> None:
    if shape != target.shape:
        raise ModelError(
            f"{adapter.directory}: {what}: the adapter changes {list(shape)}, base has {list(target.shape)}",
            _OTHER_MODEL,
        )
    if not target.is_float:
        raise ModelError(f"{adapter.directory}: {what}: base has it as {target.dtype}: only floats can be adapted")


__all__ = ["LowRank", "base_name", "is_adapter", "read_lora"]
