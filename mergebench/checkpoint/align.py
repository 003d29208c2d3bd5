"""Compare models with the base, by headers alone: which tensors merge, which are copied, which do not fit.

Names are the files' names. Missing or extra tensors do not fit, except a tied alias (stored twice by some tools, once
by others) and what is no weight: integers, masks and buffers that follow from the config. The tables here have what is
frequent; for the rest, transformers is asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mergebench.checkpoint.architecture import Facts
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.names import is_vocabulary
from mergebench.errors import RecipeError

if TYPE_CHECKING:
    from mergebench.checkpoint.format import Base
    from mergebench.checkpoint.model import Model

_DERIVED = frozenset({
    "inv_freq", "original_inv_freq", "position_ids", "token_type_ids", "masked_bias", "relative_position_index",
})  # fmt: skip
_CAUSAL_MASK = re.compile(r"(^|\.)attn\.bias$")  # GPT-2's [1, 1, n, n]; a real bias has one dimension

# An alias and the tensor it is tied to, by the ends of their names (transformers' `_tied_weights_keys`).
_TIED = {
    "lm_head.weight": ("embed_tokens.weight", "wte.weight", "shared.weight", "embed_in.weight"),
    "embed_out.weight": ("embed_in.weight",),
    "proj_out.weight": ("decoder.embed_tokens.weight",),
    "encoder.embed_tokens.weight": ("shared.weight",),
    "decoder.embed_tokens.weight": ("shared.weight",),
    "predictions.decoder.weight": ("word_embeddings.weight",),
    "predictions.decoder.bias": ("predictions.bias",),
    "lm_head.decoder.weight": ("word_embeddings.weight",),
    "lm_head.decoder.bias": ("lm_head.bias",),
}
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|proj_out|predictions\.decoder|lm_head\.decoder)\.weight$")


_ALIASES = tuple(_TIED)


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
    idle: dict[str, list[str]] = field(default_factory=dict)  # by model: no weights, and not stored by all

    def notes(self, base: Model) -> list[str]:
        """Where tensors that are no weights, and that some models lack, come from."""
        return [
            f"{reference}: {_listed(names)}: no weight, and not in every model; "
            + ("copied" if reference == base.reference else "left out")
            for reference, names in self.idle.items()
        ]


def align(base: Model, models: Sequence[Model], wanted: Callable[[str], bool]) -> Alignment:
    """Match every model's tensors with the base's; `wanted(name)` says which are to be merged.

    `RecipeError` if one of two copies is to be merged and the other is not.
    """
    result, ties, theirs = Alignment(), Ties(base), [Ties(model) for model in models]
    facts = Facts(base.config, base.tensors)
    copies = _separate_head(base) and any(name.endswith("shared.weight") for name in base.tensors)
    for name, info in base.tensors.items():
        target = ties.target(name)
        if target is None and copies and name.endswith("embed_tokens.weight"):
            target = facts.tied_to(name, base.tensors)
        if target is not None:
            result.aliases[name] = target
            if wanted(target) and not wanted(name):
                raise RecipeError(
                    f"exclude: '{name}' is a copy of '{target}', which is merged", "exclude both or neither"
                )
        if not wanted(name) or is_derived(info):
            result.copied.append(name)
            continue
        found = [_find(model, tied, name, facts) for model, tied in zip(models, theirs, strict=True)]
        if None in found and facts.idle(info):
            result.idle.setdefault(base.reference, []).append(name)
            result.copied.append(name)
            continue
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
    for model, tied in zip(models, theirs, strict=True):
        facts = Facts(model.config, model.tensors)
        for name in model.tensors.keys() - base.tensors.keys():
            if not is_derived(model.tensors[name]) and wanted(name):
                target = tied.target(name) or facts.tied_to(name, model.tensors)
                _judge_extra(result, base, model, name, target, facts)
    result.problems.sort(key=lambda problem: problem.text)
    return result


def with_head(base: Model, models: Sequence[Model]) -> Model:
    """The base with a head of its own, where it ties the head to its embedding and a model does not."""
    apart = {name for model in models if _separate_head(model) for name in model.tensors}
    ties = Ties(base)
    tied = {name: target for name in sorted(apart) if (target := ties.target(name)) is not None}
    if not tied:
        return base
    heads = {name: target for name, target in tied.items() if name not in base.tensors}
    return replace(
        base,
        tensors={**base.tensors, **{name: base.tensors[of]._replace(name=name) for name, of in heads.items()}},
        deltas={**base.deltas, **{name: base.deltas[of] for name, of in heads.items() if of in base.deltas}},
        config_changes={**(base.config_changes or {}), **untied(base.config)},
    )


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Changes to a config.json, for files that store a head apart from its embedding."""
    changes: dict[str, Any] = {"tie_word_embeddings": False}
    text_config = config.get("text_config")
    if isinstance(text_config, dict):
        changes["text_config"] = text_config | {"tie_word_embeddings": False}
    return changes


def _separate_head(model: Model | Base) -> bool:
    """Whether a head is not tied to the embedding: its config says it, or means it by saying nothing."""
    said = model.config.get("tie_word_embeddings")
    heads = [name for name in model.tensors if _HEADS.search(name)] if said is None else []
    facts = Facts(model.config, model.tensors)
    return said is False or any(facts.apart(name) for name in heads)


def is_derived(info: TensorInfo) -> bool:
    """A buffer that every model computes from its config, whether or not it is stored."""
    return info.name.rpartition(".")[2] in _DERIVED or (len(info.shape) == 4 and bool(_CAUSAL_MASK.search(info.name)))


class Ties:
    """The tied tensors of a model; its names are searched once for each end."""

    def __init__(self, model: Model | Base) -> None:
        self._model = model
        self._apart = _separate_head(model)
        self._known: dict[str, str | None] = {}

    def target(self, name: str) -> str | None:
        """The tensor that `name` is an alias of in this model, if any."""
        if self._apart or not name.endswith(_ALIASES):
            return None
        ends = [end for end in _TIED if _ends(name, end)]
        found = (self._only(target) for end in ends for target in _TIED[end])
        return next((target for target in found if target not in (None, name)), None)

    def tensor(self, name: str) -> TensorInfo | None:
        """That tensor."""
        target = self.target(name)
        return None if target is None else self._model.tensors[target]

    def _only(self, end: str) -> str | None:
        """The name of the only tensor with this end."""
        if end not in self._known:
            matches = [name for name in self._model.tensors if _ends(name, end)]
            self._known[end] = matches[0] if len(matches) == 1 else None
        return self._known[end]


def _ends(name: str, end: str) -> bool:
    return name.endswith(end) and (len(name) == len(end) or name[-len(end) - 1] == ".")


def _find(model: Model, ties: Ties, name: str, facts: Facts) -> TensorInfo | None:
    info = model.tensors.get(name) or ties.tensor(name)
    if info is None:
        target = facts.tied_to(name, model.tensors)
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


def _judge_extra(result: Alignment, base: Model, model: Model, name: str, target: str | None, facts: Facts) -> None:
    info = model.tensors[name]
    if target is not None and target in base.tensors:
        result.must_equal.append((model, info, model.tensors[target]))
        return
    if facts.idle(info):
        result.idle.setdefault(model.reference, []).append(name)
        return
    text = f"{name}: {model.reference} has {list(info.shape)}, base does not have it"
    result.problems.append(Problem(text, model, name, "extra"))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"'{min(names)}'{more}"
