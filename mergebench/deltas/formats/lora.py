"""A LoRA directory as PEFT saves it: factors by module, tensors saved whole, their settings.

    delta W = scale * B @ A,  scale = alpha / r  (alpha / sqrt(r) for rsLoRA)

with A [r, in] and B [out, r] (arXiv:2106.09685; rsLoRA arXiv:2312.03732), and DoRA's norms (arXiv:2402.09353).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergebench.checkpoint.format import Base, Deltas, delta_format
from mergebench.checkpoint.header import Header, TensorInfo
from mergebench.checkpoint.kind import Part
from mergebench.deltas.dense import dense
from mergebench.deltas.dora import dora
from mergebench.deltas.low_rank import low_rank
from mergebench.deltas.peft.directory import (
    CONFIG,
    by_module,
    holds_no_model,
    of_type,
    read_directory,
)
from mergebench.deltas.peft.module import patterned
from mergebench.deltas.peft.names import Placing, on_stored
from mergebench.errors import ModelError

_UNSUPPORTED = {
    "trainable_token_indices": "trained tokens",
    "target_parameters": "LoRA of bare parameters",
    "layer_replication": "layers used more than once",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
_RESIDUAL = ("pissa", "corda", "olora", "loftq")  # the factors start as a part of the base, which is subtracted from it
_PARTS = {
    "A": re.compile(r"(.+)\.lora_A(?:\.default)?\.weight"),
    "B": re.compile(r"(.+)\.lora_B(?:\.default)?\.weight"),
    "bias": re.compile(r"(.+)\.lora_B(?:\.default)?\.bias"),
    "magnitude": re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?"),
}


@dataclass(frozen=True)
class Factors:
    """One module's part of an adapter: scale * B @ A, with DoRA's magnitude and the bias of B if present."""

    a: TensorInfo
    b: TensorInfo
    scale: float
    magnitude: TensorInfo | None
    bias: TensorInfo | None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in], even if the base stores [in, out]."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """A LoRA directory: config and header are read and checked, data is not touched."""

    directory: Path
    config: dict[str, Any]
    header: Header
    modules: dict[str, Factors]  # by the module's name, without PEFT's prefix, in file order
    whole: dict[str, TensorInfo]  # tensors that replace the base's (biases, modules_to_save)

    @property
    def transposed(self) -> bool:
        """Whether the base stores its weights [in, out] (GPT-2's Conv1D)."""
        return bool(self.config.get("fan_in_fan_out"))


def read_adapter(directory: Path) -> Adapter:
    """Read a LoRA directory; `ModelError` if it is none, or of a type not supported."""
    config, header = read_directory(directory)
    _check_lora(directory, config)
    parts, whole = by_module(directory, header, config, _PARTS)
    modules = {module: _factors(directory, module, found, config) for module, found in parts.items()}
    if not modules:
        raise ModelError(f"{directory}: the adapter holds no " + ("LoRA factors" if whole else "tensors"))
    return Adapter(directory, config, header, modules, whole)


def residual(config: Mapping[str, Any]) -> str | None:
    """The LoRA's initialisation method, if it subtracted a part from the base."""
    start = config.get("init_lora_weights")
    return start if isinstance(start, str) and start.lower().startswith(_RESIDUAL) else None


def _check_lora(directory: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{directory}: adapter type {config.get('peft_type')!r} is not supported, only LORA is")
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            raise ModelError(f"{directory}: {what} ({key}) is not supported yet")
    start = residual(config)
    if start is not None:
        raise ModelError(
            f"{directory}: init_lora_weights: {start}: its factors belong to a changed base",
            "let PEFT convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), (int, float)):
        raise ModelError(f"{directory / CONFIG}: r and lora_alpha must be numbers")


def _factors(directory: Path, module: str, found: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Factors:
    if not {"A", "B"} <= found.keys():
        raise ModelError(f"{directory}: {module}: only one of lora_A and lora_B is there")
    a, b = found["A"], found["B"]
    rank = a.shape[0] if a.shape else 0
    if not (a.is_float and b.is_float and len(a.shape) == len(b.shape) == 2 and rank == b.shape[1] and rank):
        raise ModelError(f"{directory}: {module}: factors {list(a.shape)} and {list(b.shape)} do not multiply")
    for part, key in (("magnitude", "use_dora"), ("bias", "lora_bias")):
        vector = found.get(part)
        if (vector is not None) != bool(config.get(key)):
            raise ModelError(f"{directory}: {module}: {key} is {config.get(key)!r}, but its vector tells otherwise")
        if vector is not None and (vector.shape != b.shape[:1] or not vector.is_float):
            raise ModelError(f"{directory}: {module}: {part} {list(vector.shape)} does not fit B {list(b.shape)}")
    scale = _alpha(directory, module, config) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(a, b, scale, found.get("magnitude"), found.get("bias"))


def _alpha(directory: Path, module: str, config: Mapping[str, Any]) -> float:
    try:
        return float(patterned(directory, module, config, "alpha_pattern", config["lora_alpha"]))
    except (TypeError, ValueError):
        raise ModelError(f"{directory / CONFIG}: alpha_pattern must map modules to numbers") from None


@delta_format(what="an adapter", claims=of_type("LORA"), alone=holds_no_model)
def lora(directory: Path, base: Base) -> Deltas:
    """What a LoRA directory changes; `ModelError` where it is for another base, or of a kind not supported."""
    adapter = read_adapter(directory)
    placing = Placing(directory, base, shapes_of(adapter))
    weights = []
    for module, factors in adapter.modules.items():
        parts = on_stored(factors.b, factors.a, adapter.transposed)
        if factors.magnitude is None:
            weights.append(placing.put(f"{module}.weight", module, low_rank, parts, scale=factors.scale))
        else:
            parts["magnitude"] = Part(factors.magnitude)
            settings = {"scale": factors.scale, "columns": adapter.transposed}
            weights.append(placing.put(f"{module}.weight", module, dora, parts, **settings))
        if factors.bias is not None:
            placing.put(f"{module}.bias", module, dense, {"values": Part(factors.bias)}, scale=factors.scale)
    placing.put_whole(adapter.whole)
    if adapter.config.get("bias", "none") != "none":
        for name in (f"{weight.removesuffix('.weight')}.bias" for weight in weights):
            if name in base.tensors and name not in placing.deltas:
                raise ModelError(f"{directory}: bias: {adapter.config['bias']}, but it holds no '{name}'")
    return Deltas(placing.deltas, [adapter.header])


def shapes_of(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The shapes, as the base stores them, of the tensors that an adapter changes, by the adapter's names."""
    shapes = {name: tensor.shape for name, tensor in adapter.whole.items()}
    for module, factors in adapter.modules.items():
        shapes[f"{module}.weight"] = factors.shape[::-1] if adapter.transposed else factors.shape
        if factors.bias is not None:
            shapes[f"{module}.bias"] = factors.bias.shape
    return shapes
