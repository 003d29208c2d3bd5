"""A LoRA directory as PEFT saves it: factors by module, tensors saved whole, their settings.

    delta W = scale * B @ A,  scale = alpha / r  (alpha / sqrt(r) for rsLoRA)

with A [r, in] and B [out, r] (arXiv:2106.09685; rsLoRA arXiv:2312.03732), and DoRA's norms (arXiv:2402.09353).
`peft/factors.py` reads the factors of linear layers, embeddings and convolutions, `peft/parameters.py` those of bare
parameters such as fused experts, `peft/tokens.py` has single tokens and tied heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.experts import Place, layout, place_in_fused
from mergebench.checkpoint.format import Base, Deltas, delta_format
from mergebench.checkpoint.header import Header, TensorInfo
from mergebench.checkpoint.kind import Misfit, Part
from mergebench.checkpoint.stacked import stacked
from mergebench.deltas.dense import dense
from mergebench.deltas.peft.directory import (
    CONFIG,
    OTHER_MODEL,
    by_module,
    holds_no_model,
    of_type,
    read_directory,
)
from mergebench.deltas.peft.factors import PATTERNS, Factors, read_factors
from mergebench.deltas.peft.heads import new_head, with_head
from mergebench.deltas.peft.names import Placing, put_whole
from mergebench.deltas.peft.orientation import Orientation
from mergebench.deltas.peft.parameters import Wrapped, names_of, put_wrapped, take_wrapped
from mergebench.deltas.peft.tokens import put_tokens, untie, with_aliases
from mergebench.errors import ModelError

_REFUSED = {
    "layer_replication": "it uses layers more than once, which is another model",
    "alora_invocation_tokens": "activated LoRA changes the model only after its invocation tokens: no weights do that",
    "use_qalora": "QALoRA's A reads means of groups of inputs, for bases that stay quantized: it does not merge",
    "arrow_config": "Arrow chooses among adapters by the input: no weights do that",
    "kasa_config": "KaSA cuts the base by an SVD in float32, which cannot be redone exactly from the files",
    "velora_config": "VeLoRA's projections beside the factors are not read",
}  # fmt: skip
# the factors start as a part of the base, which is subtracted from it
_RESIDUAL = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """A LoRA directory: config and header are read and checked, data is not touched."""

    directory: Path
    config: dict[str, Any]
    header: Header
    modules: dict[str, Factors]  # by the module's name, without PEFT's prefix, in file order
    whole: dict[str, TensorInfo]  # tensors that replace the base's (biases, modules_to_save)
    parameters: dict[str, Wrapped]  # bare parameters, by module
    tokens: dict[str, TensorInfo]  # trained rows of embeddings, by module

    @property
    def transposed(self) -> bool:
        """Whether the config says that the base stores weights [in, out] (GPT-2's Conv1D)."""
        return bool(self.config.get("fan_in_fan_out"))

    @property
    def beside(self) -> str | None:
        """A part that is no factor of a linear layer or embedding, nor saved whole, if there is one."""
        for module, factors in self.modules.items():
            if factors.kernel or factors.base:
                return f"'{module}', {'a convolution' if factors.kernel else 'with the weight it is added to'}"
        for module in (*self.parameters, *self.tokens):
            return f"'{module}', {'bare parameters' if module in self.parameters else 'trained tokens'}"
        return None


def read_adapter(directory: Path) -> Adapter:
    """Read a LoRA directory; `ModelError` if it is none, or of a type not supported."""
    config, header = read_directory(directory)
    _check_lora(directory, config)
    parts, whole = by_module(directory, header, config, PATTERNS)
    tokens = {module: found.pop("tokens") for module, found in parts.items() if "tokens" in found}
    wrapped, parts = take_wrapped({module: found for module, found in parts.items() if found}, config)
    modules = {module: read_factors(directory, module, found, config) for module, found in parts.items()}
    if not (modules or wrapped or tokens):
        raise ModelError(f"{directory}: the adapter holds no " + ("LoRA factors" if whole else "tensors"))
    return Adapter(directory, config, header, modules, whole, wrapped, tokens)


def residual(config: Mapping[str, Any]) -> str | None:
    """The LoRA's initialisation method, if it subtracted a part from the base."""
    start = config.get("init_lora_weights")
    return start if isinstance(start, str) and start.lower().startswith(_RESIDUAL) else None


def _check_lora(directory: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{directory}: adapter type {config.get('peft_type')!r} is not supported, only LORA is")
    for key, why in _REFUSED.items():
        if config.get(key):
            raise ModelError(f"{directory}: {key}: {why}")
    start = residual(config)
    if start is not None:
        raise ModelError(
            f"{directory}: init_lora_weights: {start}: its factors belong to a changed base",
            "let PEFT convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), (int, float)):
        raise ModelError(f"{directory / CONFIG}: r and lora_alpha must be numbers")


@delta_format(what="an adapter", claims=of_type("LORA"), alone=holds_no_model)
def lora(directory: Path, base: Base) -> Deltas:
    """What a LoRA directory changes; `ModelError` where it is for another base, or of a kind not supported."""
    adapter = read_adapter(directory)
    of_experts = _experts(adapter, base)
    shapes = {
        **{name: shape for name, shape in shapes_of(adapter).items() if name not in of_experts},
        **{place.tensor: None for place in of_experts.values()},
        **names_of(adapter.parameters, base),
        **{f"{module}.weight": None for module in adapter.tokens},
    }
    own, base = base, with_aliases(base, shapes)
    placing, below = Placing(directory, base, shapes), Placing(directory, base, shapes)
    orientation, weights = Orientation(base, adapter.transposed), []
    for module, factors in adapter.modules.items():
        stored = f"{module}.weight"
        if stored in of_experts:
            continue
        name = placing.find(stored)
        in_out = orientation.in_out(name)
        placing.check_fits(name, stored, module, factors.stored_shape(in_out))
        kind, parts, settings = factors.delta(in_out)
        placing.put_on(name, module, kind, parts, _as_matrix(factors, base.tensors[name]), **settings)
        weights.append(name)
        if factors.bias is not None:
            placing.put(f"{module}.bias", module, dense, {"values": Part(factors.bias)}, scale=factors.scale)
        if factors.base is not None:
            below.put(stored, factors.base.name, dense, {"values": Part(factors.base)}, replace=True)
    _put_experts(adapter, of_experts, placing, base)
    put_wrapped(directory, adapter.parameters, adapter.config, placing, base)
    put_tokens(directory, adapter.tokens, adapter.config, placing, base)
    head = new_head(directory, put_whole(adapter.whole, placing, below), adapter.config, own)
    if adapter.config.get("bias", "none") != "none":
        for name in (f"{weight.removesuffix('.weight')}.bias" for weight in weights):
            if name in base.tensors and name not in placing.deltas:
                raise ModelError(f"{directory}: bias: {adapter.config['bias']}, but it holds no '{name}'")
    added, config = untie(directory, own, base, placing.deltas, bool(adapter.config.get("ensure_weight_tying")))
    return with_head(Deltas(placing.deltas, [adapter.header], first=below.deltas, added=added, config=config), head)


def shapes_of(adapter: Adapter) -> dict[str, tuple[int, ...] | None]:
    """The shapes, as the base stores them, of the tensors that an adapter changes, by the adapter's names."""
    shapes: dict[str, tuple[int, ...] | None] = {name: tensor.shape for name, tensor in adapter.whole.items()}
    for module, factors in adapter.modules.items():
        shapes[f"{module}.weight"] = factors.stored_shape(adapter.transposed)
        if factors.bias is not None:
            shapes[f"{module}.bias"] = factors.bias.shape
    return shapes


def _as_matrix(factors: Factors, target: TensorInfo) -> tuple[int, ...] | None:
    """The shape in which a convolution's tensor is a matrix: [out, the rest]."""
    return (target.shape[0], math.prod(target.shape[1:])) if factors.kernel else None


def _experts(adapter: Adapter, base: Base) -> dict[str, Place]:
    """The places of adapted experts, by the weight's name, where the base stores them fused."""
    known = layout(base.tensors)
    if known is None or known.words is not None:
        return {}
    places = {name: place_in_fused(name) for name in (f"{module}.weight" for module in adapter.modules)}
    return {name: place for name, place in places.items() if place is not None}


def _put_experts(adapter: Adapter, places: Mapping[str, Place], placing: Placing, base: Base) -> None:
    """Put the factors of single experts on the blocks of fused tensors."""
    found: dict[str, dict[int, Delta]] = {}
    for stored, place in places.items():
        module = stored.removesuffix(".weight")
        name = placing.find(place.tensor)
        shape = base.tensors[name].shape
        if len(shape) != 3 or shape[1] % place.blocks or place.number >= shape[0] * place.blocks:
            raise ModelError(f"{adapter.directory}: {module}: the base has {list(shape)} experts", OTHER_MODEL)
        kind, parts, settings = adapter.modules[module].delta(False)
        try:
            delta = kind.on((shape[1] // place.blocks, shape[2]), parts, **settings)
        except Misfit as error:
            text = f"{error}, base has {list(shape)}: no {place.blocks * shape[0]} blocks of that shape"
            raise ModelError(f"{adapter.directory}: {module}: {text}", OTHER_MODEL) from None
        found.setdefault(name, {})[place.number] = delta
    for name, deltas in found.items():
        shape, blocks = base.tensors[name].shape, 2 if name.endswith("gate_up_proj") else 1
        placing.put_delta(name, name, stacked(shape, shape[1] // blocks, deltas))
