"""Embeddings in an adapter: single trained tokens, and what becomes of a head that the base ties to its embedding."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoint.align import Ties, untied
from mergebench.checkpoint.architecture import Facts
from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.format import Base
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.names import layer_of
from mergebench.deltas.peft.directory import CONFIG
from mergebench.deltas.peft.names import Placing
from mergebench.deltas.replaced_rows import replaced_rows
from mergebench.errors import ModelError

_HEADS = {"gpt_neox": "embed_out.weight"}  # by model type, where it is not lm_head
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|shared|word_embeddings)\.weight$")
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def put_tokens(
    directory: Path, tokens: Mapping[str, TensorInfo], config: Mapping[str, Any], placing: Placing, base: Base
) -> None:
    """Put trained rows on embeddings, and on heads tied to them: values [k, width] replace the rows of the config."""
    wanted = config.get("trainable_token_indices")
    for module, values in tokens.items():
        rows = _rows(module, wanted)
        if rows is None or values.shape[:1] != (len(rows),) or len(set(rows)) != len(rows) or min(rows) < 0:
            raise ModelError(
                f"{directory / CONFIG}: trainable_token_indices must give {list(values.shape)[:1]} tokens of '{module}'"
            )
        name = placing.find(f"{module}.weight")
        tall = base.tensors[name].shape[:1]
        if tall and max(rows) >= tall[0]:
            raise ModelError(
                f"{directory}: {module}: it trains token {max(rows)}, the base has {tall[0]}",
                "resize the base (resize_token_embeddings) and name the model that gives",
            )
        placing.put_on(name, module, replaced_rows, {"values": values}, tokens=tuple(rows))
        for alias, target in _ties(base).items():
            if target == name and alias not in placing.deltas:  # PEFT trains one set of rows for both
                placing.put_on(alias, module, replaced_rows, {"values": values}, tokens=tuple(rows))


def _rows(module: str, wanted: Any) -> list[int] | None:
    """The tokens that a module's rows replace."""
    if isinstance(wanted, dict):
        wanted = next((rows for name, rows in wanted.items() if f".{module}".endswith(f".{name}")), None)
    if not isinstance(wanted, list) or not wanted or not all(isinstance(row, int) for row in wanted):
        return None
    return wanted


def with_aliases(base: Base, names: Iterable[str]) -> Base:
    """The base with the heads that an adapter changes, where the base has them only as aliases of its embedding."""
    added: dict[str, TensorInfo] = {}
    ties, facts = Ties(base), Facts(base.config, base.tensors)
    for name in names:
        if name not in base.tensors and _is_tied(base) and layer_of(name) is None:
            target = ties.target(name) or facts.aliases.get(name)
            added |= {} if target is None else {name: base.tensors[target]._replace(name=name)}
    return base._replace(tensors={**base.tensors, **added}) if added else base


def untie(
    directory: Path, base: Base, with_heads: Base, deltas: Mapping[str, Delta], keep: bool
) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """The tensors that the base has to store apart, and the changes to its config, where an adapter makes a head and
    its embedding differ.

    with_heads: the base as `with_aliases` gives it. keep: whether a change of the embedding alone is the head's, too.
    """
    if not _is_tied(base):
        return {}, {}
    added = {name: info for name, info in with_heads.tensors.items() if name not in base.tensors}
    pairs, apart = _ties(with_heads), False
    facts = Facts(base.config, base.tensors)
    if any(layer_of(name) is None and delta.replacement is None for name, delta in deltas.items()):
        pairs |= {name: of for name, of in facts.aliases.items() if len(base.tensors[of].shape) == 2}
    for name in deltas:
        if _EMBEDDING.search(name) and name not in pairs.values():  # the head is not stored
            head = _head(directory, base, name)
            pairs |= {} if head is None else {head: name}
    for head, embedding in pairs.items():
        found = [deltas[name] for name in (head, embedding) if name in deltas]
        if not found or (len(found) == 2 and found[0].digest == found[1].digest):
            continue
        if len(found) == 1 and (found[0].replacement is not None or found[0].kind == replaced_rows.name):
            continue  # half of a pair saved whole is refused when the model is opened; rows are for both
        if len(found) == 1 and keep:
            if head in with_heads.tensors:
                text = f"the adapter changes '{embedding}' for both, the base also stores '{head}'"
                raise ModelError(f"{directory}: ensure_weight_tying: {text}", "save the base again with transformers")
            continue
        added |= {} if head in base.tensors else {head: base.tensors[embedding]._replace(name=head)}
        apart = True
    if not apart:
        return added, {}
    ties, others = Ties(base), {name: of for name, of in facts.aliases.items() if name not in base.tensors}
    added = {name: base.tensors[of]._replace(name=name) for name, of in others.items()} | added  # none is tied any more
    for head in pairs:  # its bias may be an alias as well
        bias = f"{head.removesuffix('weight')}bias"
        tensor = None if bias in base.tensors else ties.tensor(bias)
        added |= {} if tensor is None else {bias: tensor._replace(name=bias)}
    return added, untied(base.config)


def _head(directory: Path, base: Base, embedding: str) -> str | None:
    """The name of the head tied to an embedding; None for a model without."""
    kinds = [str(kind) for kind in base.config.get("architectures") or []]
    if kinds and all(kind.endswith("Model") and not kind.endswith("LMHeadModel") for kind in kinds):
        return None
    if not any(kind.endswith(_WITH_HEAD) for kind in kinds):
        raise ModelError(
            f"{directory}: '{embedding}' is adapted, the base ties its head to it, and the head's name is not known",
            "save the base with its head apart, tie_word_embeddings: false",
        )
    return _HEADS.get(str(base.config.get("model_type")), "lm_head.weight")


def _ties(base: Base) -> dict[str, str]:
    """Heads that the base stores, by name, and the embeddings that they are tied to."""
    if not _is_tied(base):
        return {}
    ties = Ties(base)
    found = {name: ties.target(name) for name in base.tensors}
    return {name: target for name, target in found.items() if target is not None}


def _is_tied(base: Base) -> bool:
    return bool(base.config) and bool(base.config.get("tie_word_embeddings", True))
