"""LoRA directories (PEFT's format) as low-rank differences, by the names of the base's files.

    delta W = scale * B @ A,  scale = alpha / r  (alpha / sqrt(r) for rsLoRA)

with A [r, in] and B [out, r] (arXiv:2106.09685; rsLoRA arXiv:2312.03732). The product is never
written out as a full model: the engine computes the rows it needs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergebench.checkpoint.header import Header, TensorInfo, read_header
from mergebench.errors import ModelError, RunError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "a LoRA bias",
    "modules_to_save": "modules saved whole",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "layers used more than once",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
_RESIDUAL = ("pissa", "corda", "olora", "loftq")  # begin as a part of the base, which is taken out of it


@dataclass(frozen=True)
class LowRank:
    """scale * B @ A for one tensor; `transposed` where the base stores it [in, out] (GPT-2's Conv1D)."""

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def read_lora(directory: Path, base: Mapping[str, TensorInfo]) -> tuple[dict[str, LowRank], Header]:
    """The low-rank differences of a LoRA directory, by base tensor name.

    Raises `ModelError` where the adapter does not belong to this base or is of a kind not supported.
    """
    config = _config(directory)
    if not (directory / WEIGHTS).is_file():
        found = "a pickle, which is never loaded" if (directory / "adapter_model.bin").exists() else "nothing"
        raise ModelError(f"{directory}: no {WEIGHTS} (found {found})", "save the adapter as safetensors")
    header = read_header(directory / WEIGHTS)
    factors: dict[str, dict[str, TensorInfo]] = {}
    for tensor in header.tensors:
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", tensor.name)
        if match is None:
            raise ModelError(f"{directory}: {tensor.name}: not a LoRA factor of a linear layer: not supported yet")
        factors.setdefault(match[1], {})[match[2]] = tensor
    deltas = {}
    for module, pair in factors.items():
        if len(pair) != 2:
            raise ModelError(f"{directory}: {module}: only one of lora_A and lora_B is there")
        name = _base_name(directory, module, base)
        if name in deltas:
            raise ModelError(f"{directory}: {module}: a second pair of factors for '{name}'")
        deltas[name] = _low_rank(directory, module, pair["A"], pair["B"], config, base[name])
    if not deltas:
        raise ModelError(f"{directory}: the adapter holds no tensors")
    return deltas, header


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{directory}: not an adapter: no {CONFIG}", "write BASE+ADAPTER with a LoRA directory"
        ) from None
    except (OSError, ValueError):
        raise RunError(f"{directory / CONFIG}: not readable as JSON") from None
    if not isinstance(config, dict):
        raise RunError(f"{directory / CONFIG}: not a JSON object")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{directory}: adapter type {config.get('peft_type')!r} is not supported, only LORA is")
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            raise ModelError(f"{directory}: {what} ({key}) is not supported yet")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL):
        raise ModelError(
            f"{directory}: init_lora_weights: {start}: its factors belong to a changed base",
            "let PEFT convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    if config.get("bias", "none") != "none":
        raise ModelError(f"{directory}: trained biases (bias: {config['bias']}) are not supported yet")
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), (int, float)):
        raise ModelError(f"{directory / CONFIG}: r and lora_alpha must be numbers")
    return config


def _base_name(directory: Path, module: str, base: Mapping[str, TensorInfo]) -> str:
    """The base tensor a module's factors belong to.

    The adapter may have been trained on a model whose class adds or drops a prefix (`model.`, `bert.`).
    """
    name = f"{module}.weight"
    if name in base:
        return name
    ends = [known for known in base if known.endswith(f".{name}") or name.endswith(f".{known}")]
    if len(ends) != 1:
        raise ModelError(
            f"{directory}: the base has no tensor '{name}' to adapt",
            "this adapter was trained on another model: name that one before the '+'",
        )
    return ends[0]


def _low_rank(
    directory: Path, module: str, a: TensorInfo, b: TensorInfo, config: Mapping[str, Any], target: TensorInfo
) -> LowRank:
    rank = a.shape[0] if a.shape else 0
    if not (a.is_float and b.is_float and len(a.shape) == len(b.shape) == 2 and rank == b.shape[1] and rank):
        raise ModelError(f"{directory}: {module}: factors {list(a.shape)} and {list(b.shape)} do not multiply")
    scale = _alpha(directory, module, config) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    transposed = bool(config.get("fan_in_fan_out"))
    shape = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
    if shape != target.shape:
        raise ModelError(
            f"{directory}: {module}: the adapter changes {list(shape)}, base has {list(target.shape)}",
            "this adapter was trained on another model: name that one before the '+'",
        )
    if not target.is_float:
        raise ModelError(f"{directory}: {module}: base has it as {target.dtype}: only floats can be adapted")
    return LowRank(a, b, scale, transposed)


def _alpha(directory: Path, module: str, config: Mapping[str, Any]) -> float:
    try:
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return float(value)
    except (re.error, AttributeError, TypeError, ValueError):
        raise ModelError(f"{directory / CONFIG}: alpha_pattern must map modules to numbers") from None
    return float(config["lora_alpha"])
