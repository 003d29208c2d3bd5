"""Compare models with the base, by headers alone: which tensors merge, which are copied, which do not fit.

Names are the files' names. Missing or extra tensors do not fit, except a tied alias (stored twice by
some tools, once by others) and buffers every model derives from its config.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.names import is_vocabulary

if TYPE_CHECKING:
    from mergebench.checkpoint.format import Base
    from mergebench.checkpoint.model import Model

_DERIVED = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|position_ids|token_type_ids|masked_bias|relative_position_index)$"
)
_CAUSAL_MASK = re.compile(r"(^|\.)attn\.bias$")  # GPT-2's [1, 1, n, n]; a real bias has one dimension

# An alias and the tensor it is tied to, by the ends of their names (transformers' `_tied_weights_keys`).
_TIED = {
    "lm_head.weight": ("embed_tokens.weight", "wte.weight", "shared.weight", "embed_in.weight"),
    "embed_out.weight": ("embed_in.weight",),
    "encoder.embed_tokens.weight": ("shared.weight",),
    "decoder.embed_tokens.weight": ("shared.weight",),
    "predictions.decoder.weight": ("word_embeddings.weight",),
    "predictions.decoder.bias": ("predictions.bias",),
    "lm_head.decoder.weight": ("word_embeddings.weight",),
    "lm_head.decoder.bias": ("lm_head.bias",),
}

_ENDS = tuple(_TIED)


class Problem(NamedTuple):
    """One mismatch between a model and the base, in a line."""

    text: str
    model: Model
    name: str
    kind: Literal["missing", "extra", "shape", "tokens", "type"]  # tokens: vocabulary sizes differ


@dataclass
class Alignment:
    """How the tensors of a merge match, by headers alone."""

    merged: list[str] = field(default_factory=list)  # names, in the base's file order
    copied: list[str] = field(default_factory=list)  # from the base: excluded, integer, derived or empty
    sources: dict[str, list[TensorInfo]] = field(default_factory=dict)  # merged name -> one for each model
    problems: list[Problem] = field(default_factory=list)  # every mismatch
    must_equal: list[tuple[Model, TensorInfo, TensorInfo]] = field(default_factory=list)  # tied, by bytes
    aliases: dict[str, str] = field(default_factory=dict)  # tied tensors that the base stores twice


def align(base: Model, models: Sequence[Model], wanted: Callable[[str], bool]) -> Alignment:
    """Match every model's tensors with the base's; `wanted(name)` says which are to be merged."""
    result = Alignment()
    for name, info in base.tensors.items():
        target = tied_to(name, base)
        if target is not None:
            result.aliases[name] = target
        if not wanted(name) or is_derived(info):
            result.copied.append(name)
            continue
        found = [_find(model, name) for model in models]
        if not info.is_float:
            for model, other in zip(models, found, strict=True):
                if other is not None and other.is_float:
                    text = f"{name}: {model.reference} has {other.dtype}, base has {info.dtype}"
                    result.problems.append(Problem(text, model, name, "type"))
            result.copied.append(name)
            continue
        sources = []
        for model, other in zip(models, found, strict=True):
            problem = _mismatch(name, info, model, other)
            if problem:
                result.problems.append(problem)
            elif other is not None:
                sources.append(other)
        if not info.numel:  # no elements to ask about
            result.copied.append(name)
            continue
        result.merged.append(name)
        result.sources[name] = sources
    for model in models:
        for name in model.tensors.keys() - base.tensors.keys():
            _judge_extra(result, base, model, name, wanted)
    result.problems.sort(key=lambda problem: problem.text)
    return result


def is_derived(info: TensorInfo) -> bool:
    """A buffer that every model computes from its config, whether or not it is stored."""
    return bool(_DERIVED.search(info.name)) or (len(info.shape) == 4 and bool(_CAUSAL_MASK.search(info.name)))


def tied_to(name: str, model: Model | Base) -> str | None:
    """The tensor that `name` is an alias of in this model, if any."""
    if not name.endswith(_ENDS) or (model.config and not model.config.get("tie_word_embeddings", True)):
        return None
    for end, targets in _TIED.items():
        if name == end or name.endswith("." + end):
            for target in targets:
                matches = [known for known in model.tensors if known == target or known.endswith("." + target)]
                if len(matches) == 1 and matches[0] != name:
                    return matches[0]
    return None


def _find(model: Model, name: str) -> TensorInfo | None:
    info = model.tensors.get(name)
    if info is None:
        target = tied_to(name, model)
        info = model.tensors[target] if target is not None else None
    return info


def _mismatch(name: str, info: TensorInfo, model: Model, other: TensorInfo | None) -> Problem | None:
    if other is None:
        text = f"{name}: {model.reference} does not have it, base has {list(info.shape)}"
        return Problem(text, model, name, "missing")
    if other.shape != info.shape:
        text = f"{name}: {model.reference} has {list(other.shape)}, base has {list(info.shape)}"
        tokens = is_vocabulary(name) and other.shape[1:] == info.shape[1:]
        return Problem(text, model, name, "tokens" if tokens else "shape")
    if not other.is_float:
        text = f"{name}: {model.reference} has {other.dtype}, base has {info.dtype}"
        return Problem(text, model, name, "type")
    return None


def _judge_extra(result: Alignment, base: Model, model: Model, name: str, wanted: Callable[[str], bool]) -> None:
    info = model.tensors[name]
    if is_derived(info) or not wanted(name):
        return
    target = tied_to(name, model)
    if target is not None and target in base.tensors:
        result.must_equal.append((model, info, model.tensors[target]))
        return
    text = f"{name}: {model.reference} has {list(info.shape)}, base does not have it"
    result.problems.append(Problem(text, model, name, "extra"))
