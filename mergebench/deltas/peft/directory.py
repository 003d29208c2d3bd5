"""A PEFT directory of any type: config and header, and tensors that replace the base's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from mergebench.checkpoint.documents import document, read_json
from mergebench.checkpoint.header import Header, TensorInfo, read_header
from mergebench.checkpoint.names import is_vocabulary
from mergebench.checkpoint.naming import HEAD, find_weights
from mergebench.deltas.peft.settings import check_settings
from mergebench.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OTHER_MODEL = "this adapter was trained on another model: name that one before the '+'"
PREFIX = "base_model.model."  # PEFT's prefix of module names
_HEADS = {"classifier", "score"}  # PEFT lists both for every classifier, which has one of them
_BIAS = re.compile(r"(.+?)(?:\.base_layer)?\.bias")


class Config(TypedDict, total=False):
    """What every type's adapter_config.json has."""

    peft_type: str | None
    base_model_name_or_path: str | None
    modules_to_save: list[str] | str | None
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def of_type(kind: str) -> Callable[[Path], bool]:
    """Whether a path is a directory of this PEFT type, by its config."""

    def claims(place: Path) -> bool:
        return is_adapter(place) and peft_type(place) == kind

    return claims


def holds_no_model(directory: Path) -> bool:
    """Whether the directory does not also hold a model."""
    return find_weights(directory) is None


def peft_type(directory: Path) -> str | None:
    """The type that the config names; None if it names none, or cannot be read."""
    try:
        config: dict[str, Any] = read_json(directory / CONFIG)
    except (OSError, ValueError):
        return None
    kind = config.get("peft_type")
    return kind if isinstance(kind, str) else None


def read_directory(directory: Path) -> tuple[dict[str, Any], Header]:
    """Config and header of a PEFT directory of any type; `ModelError` if it is no adapter."""
    config: dict[str, Any] = document(directory / CONFIG, Config, missing=_no_adapter(directory))
    check_settings(directory / CONFIG, config)
    if not (directory / WEIGHTS).is_file():
        found = "a pickle, which is never loaded" if (directory / "adapter_model.bin").exists() else "nothing"
        raise ModelError(f"{directory}: no {WEIGHTS} (found {found})", "save the adapter as safetensors")
    return config, read_header(directory / WEIGHTS)


def _no_adapter(directory: Path) -> ModelError:
    """What a directory without a config is."""
    what, hint = f"no {CONFIG}", "name a LoRA directory as PEFT saves it; on a model: BASE+ADAPTER"
    if find_weights(directory) is not None:
        what, hint = "it is a model", f"name it alone, {directory}, or an adapter on it, BASE+ADAPTER"
    elif [file.name for file in directory.glob("*.safetensors")] == [HEAD]:
        what, hint = "a head alone, which changes no weights", f"name the base; suites name {directory / HEAD}"
    return ModelError(f"{directory}: not an adapter: {what}", hint)


def by_module(
    directory: Path, header: Header, config: Mapping[str, Any], patterns: Mapping[str, re.Pattern[str]]
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """Sort a header's tensors into the parts of each module, and tensors saved whole, by the base's tensor names.

    The first group of a pattern is the module's name; a second one is appended to the part's, as in `E.0`. Any other
    tensor is refused by name.
    """
    parts: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    for tensor in header.tensors:
        name = tensor.name.removeprefix(PREFIX)
        for part, pattern in patterns.items():
            match = pattern.fullmatch(name)
            if match is not None:
                part = part if pattern.groups == 1 else f"{part}.{match[2]}"
                if part in parts.setdefault(match[1], {}):
                    raise ModelError(f"{directory}: {match[1]}: a second {part}: '{tensor.name}'")
                parts[match[1]][part] = tensor
                break
        else:
            whole[whole_name(directory, tensor.name, name, config)] = tensor
    missing = [saved for saved in saved_modules(config) if not any(f"{saved}." in name for name in whole)]
    if set(missing) < _HEADS and any(f"{head}." in name for head in _HEADS for name in whole):
        missing = []
    for saved in missing:
        raise ModelError(f"{directory}: modules_to_save names '{saved}', {WEIGHTS} holds no tensor of it")
    return parts, whole


def whole_name(directory: Path, stored: str, name: str, config: Mapping[str, Any]) -> str:
    """The name of the base's tensor that a tensor saved whole replaces, without PEFT's wrappers."""
    bias = _BIAS.fullmatch(name)
    if bias is not None and config.get("bias", "none") != "none":
        return f"{bias[1]}.bias"
    # PEFT saves embeddings and heads unlisted where a vocabulary was resized
    inside = is_vocabulary(name) or any(f"{module}." in name for module in saved_modules(config))
    if not inside or "lora_" in name or ".base_layer." in name:
        raise ModelError(f"{directory}: {stored}: not known in an adapter of this type")
    return name


def saved_modules(config: Mapping[str, Any]) -> list[str]:
    saved = config.get("modules_to_save") or []
    return [str(module) for module in (saved if isinstance(saved, list) else [saved])]
