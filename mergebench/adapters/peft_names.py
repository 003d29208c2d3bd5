"""PEFT's names of a model's modules: those of the transformers class, which may add a prefix to the files' names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.names import match
from mergebench.errors import ModelError

_ALREADY = re.compile(r"^model\.")  # the name of the inner model in most classes with a head
_WITHOUT_HEAD = re.compile(r"(?<!Head)(?<!Heads)Model$")


def prefix(model: Model, modules: Collection[str]) -> str:
    """The prefix of the files' names in the class that config.json names, such as `transformer.`.

    GPT-2's files say `h.0.attn.c_attn`, a GPT2LMHeadModel `transformer.h.0.attn.c_attn`; transformers loads either,
    PEFT only the class's names. If the class is not available, there is no prefix.
    """
    name = _class_name(model)
    if not name or _WITHOUT_HEAD.search(name) or any(_ALREADY.match(module) for module in modules):
        return ""
    built = _build(model)
    if built is None:
        return ""
    known = {module for module, _ in built.named_modules()}
    ways = ("", f"{built.base_model_prefix}.")
    return next((way for way in ways if all(way + module in known for module in modules)), "")


def modules_of(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The module of each weight, by the files' names; only modules whose name in the class is known.

    If the class is not available, all weights called `MODULE.weight`.
    """
    plain = {name: name.removesuffix(".weight") for name in shapes if name.endswith(".weight")}
    built = _build(model)
    if built is None:
        return plain
    own = {name: TensorInfo(name, "F32", tuple(value.shape), Path(), 0, 0) for name, value in built.named_parameters()}
    found = {name: name for name in shapes if name in own} | match(shapes, own)
    return {name: target.removesuffix(".weight") for name, target in found.items() if target.endswith(".weight")}


def task_type(model: Model) -> str | None:
    """PEFT's task type for the model, if it does not change which tensors are saved."""
    return "CAUSAL_LM" if _class_name(model).endswith(("ForCausalLM", "LMHeadModel")) else None


def _class_name(model: Model) -> str:
    return str((model.config.get("architectures") or [""])[0])


def _build(model: Model) -> Any:
    """The model's class built without data; None if it is missing or rejects the config."""
    import transformers

    from mergebench.networks.module import quiet

    try:
        kind = getattr(transformers, _class_name(model))
        with quiet(), torch.device("meta"):
            return kind(kind.config_class.from_dict(model.config))
    except Exception:
        return None


def stored_in_out(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether these weights of linear layers are stored [in, out], as GPT-2's are: a bias has `out` elements.
    `ModelError` if the layers differ."""
    found = set()
    for name, (rows, columns) in shapes.items():
        bias = model.tensors.get(f"{name.removesuffix('.weight')}.bias")
        if bias is not None and rows != columns and bias.shape in ((rows,), (columns,)):
            found.add(bias.shape == (columns,))
    if len(found) > 1:
        raise ModelError(f"{model.reference}: some linear layers are stored [in, out], others [out, in]")
    return True in found
