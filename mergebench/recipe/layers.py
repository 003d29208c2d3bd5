"""What config.json says of the single layers, and how it says it of the same layers in other places.

A config says it in lists with an entry for each layer, by the numbers of some layers, or by a rule: the first k, every
p-th. Lists and numbers follow the layers, and so does k where the layers still come first. A config that would make
layers of another kind than they are is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mergebench.checkpoint.documents import complaint
from mergebench.errors import ModelError

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth")
_NUMBERS = {  # numbers of the layers of one kind, counted from 0
    "attn_layer_indices", "cross_attention_layers", "full_attn_idxs", "hybrid_layer_ids", "local_layer_ids",
    "mlp_only_layers", "moe_layers", "slstm_at",
}  # fmt: skip
_FIRST = {  # how many of the first layers are of one kind; moe_layer_end_index is the last one's number
    "first_k_dense_replace": 0, "max_window_layers": 0, "moe_layer_end_index": 1, "moe_layer_start_index": 0,
    "num_dense_layers": 0, "num_first_full_attention_layers": 0,
}  # fmt: skip
_LAST = {"num_kv_shared_layers", "num_last_full_attention_layers"}
_EVERY: dict[str, int | str] = {  # every p-th is of one kind: added to the number, or the key of what is taken off
    "attn_layer_period": "attn_layer_offset", "cross_attention_frequency": 0, "decoder_sparse_step": 1,
    "expert_layer_period": "expert_layer_offset", "full_attention_interval": 1, "global_attn_every_n_layers": 0,
    "interleave_moe_layer_step": 1, "layer_group_size": 1, "moe_layer_freq": 0, "moe_layer_interval": 1,
    "no_rope_layer_interval": 1, "sliding_window_pattern": 1,
}  # fmt: skip
_APART = (
    "hidden_size_per_layer_input",
    "num_mem_blocks",
)  # of models with tensors that are made for all layers together
_UNWRITTEN = {  # what the config of a type means by leaving it out
    "cohere2": {"sliding_window_pattern": 4}, "gemma2": {"sliding_window_pattern": 2},
    "gemma3_text": {"sliding_window_pattern": 6}, "qwen3_next": {"full_attention_interval": 4},
}  # fmt: skip
_GOVERNS = {  # lists that say what the rule says: where both are written, the list holds
    "layer_types": {
        "full_attention_interval", "global_attn_every_n_layers", "layer_group_size", "max_window_layers",
        "sliding_window_pattern",
    },
    "mlp_layer_types": {"decoder_sparse_step", "first_k_dense_replace", "moe_layer_freq"},
    "moe_layers": {"interleave_moe_layer_step"},
    "no_rope_layers": {"no_rope_layer_interval"},
}  # fmt: skip
_MORE = re.compile(r"nextn_predict_layers$|(^|_)mtp_(.*_)?layers$")  # how many layers predict tokens after the next
_MANY = 100_000  # layers that no model has: such a number is no count of them
_NO_LIST = ("token", "architectures", "section", "labels", "mtp")  # in the names of lists that are not of layers
_ITSELF = "layers_block_type"  # the list whose length is the number of layers where nothing else says it (Nemotron-H)
_HINT = "choose layer_ranges that leave every kind of layer in its place"
_TIMES = list[tuple[list[str], int]]  # of attention_types


class Layer(NamedTuple):
    """A layer of a model, and the names of its tensors within it."""

    reference: str
    config: Mapping[str, Any]
    number: int
    names: frozenset[str]

    def __str__(self) -> str:
        return f"layer {self.number} of {self.reference}"


def first_predictor(config: Mapping[str, Any]) -> int | None:
    """The first layer of a stack that predicts tokens after the next one; None if the config counts no such layers."""
    part, _ = _counting(config)
    return _length(part) if any(part[key] for key in _predictors(part)) else None


def without_predictors(config: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of a config for a model without the layers that predict tokens after the next one."""
    part, under = _counting(config)
    length, more = _length(part) or 0, _predictors(part)
    longer = [length + part[key] for key in more if part[key]]
    lists = {key: value for key, value in part.items() if isinstance(value, list) and not _is_no_list(key)}
    changes = {key: value[:length] for key, value in lists.items() if len(value) in longer} | dict.fromkeys(more, 0)
    return changes if under is None else {under: {**part, **changes}}


def _predictors(part: Mapping[str, Any]) -> list[str]:
    return [key for key, value in part.items() if _MORE.search(key) and type(value) is int and value >= 0]


def kind_of(layer: Layer) -> dict[str, Any]:
    """What the model's config says of the layer, by the key that says it."""
    told = _told(_counting(layer.config)[0])
    return {key: values[layer.number] for key, values in told.items() if layer.number < len(values)}


def unlike(first: Layer, second: Layer) -> str | None:
    """How two layers differ in kind, by their tensors' names or by what the configs say; None if they do not."""
    what = f"{first} and {second} are of different kinds"
    for one, other in ((first, second), (second, first)):
        only = sorted(one.names - other.names)
        if only:
            return f"{what}: only {one} has {only[0]}"
    theirs = kind_of(second)
    for key, said in kind_of(first).items():
        if key in theirs and theirs[key] != said:
            return f"{what}, by {key} in config.json"
    return None


def follow(layers: Sequence[Layer], known: Sequence[Layer]) -> dict[str, Any]:
    """Changes of the first layer's config for a model of these layers; `ModelError` if it cannot describe them.

    known: all layers of all the models, those of the first model first.
    """
    own = layers[0].config  # holds for a model whose config leaves something out
    part, under = _counting(own)
    length, count, first = _length(part), len(layers), [one for one in known if one.reference == known[0].reference]
    if not own or (count == len(first) and all(layer.number == at for at, layer in enumerate(layers))):
        return {}
    if any(part.get(key) for key in _APART):
        what = f"slices: {layers[0].reference} has tensors with a part for each layer, in its place"
        raise ModelError(what, "merge whole models: list them under models")
    for at, layer in enumerate(layers):
        end = first_predictor(layer.config)
        if end is not None and layer.number >= end:
            raise _moved(layer, at, "and it predicts more tokens: its place is after all layers")
    kinds = [kind_of(layer._replace(config=own)) | kind_of(layer) for layer in layers]
    changes: dict[str, Any] = {key: count for key in COUNTS if length is not None and part.get(key) == length}
    for key in _told(part):
        if key in part and all(key in kind for kind in kinds):
            changes[key] = _as_written(key, part[key], [kind[key] for kind in kinds])
    changed = {**part, **changes}
    after = _told(changed)
    for key in _told(part):
        values = after.get(key, [])
        wrong = next((at for at, kind in enumerate(kinds) if [kind.get(key)] != values[at : at + 1]), None)
        if wrong is not None and not any(key in _GOVERNS[one] for one in _GOVERNS if one in changes):
            given = f"{key}: {part[key]}" if key in part else f"model_type: {part.get('model_type')}"
            raise _moved(layers[wrong], wrong, f"another kind of layer by {given} in config.json")
    _check_the_untold(layers, known, [one.names for one in first])
    return changes if under is None else {under: changed}


def _check_the_untold(layers: Sequence[Layer], known: Sequence[Layer], own: Sequence[frozenset[str]]) -> None:
    """Where the config does not tell the kinds of layers that their tensors show, every kind must keep its place, and
    the layers their number, unless only the first one is of another kind."""
    told: dict[str, frozenset[str]] = {}
    if all(layer.names == told.setdefault(json.dumps(kind_of(layer), sort_keys=True), layer.names) for layer in known):
        return
    late = own[-1] if len({*own[1:]}) == 1 else None
    for at, layer in enumerate(layers[: len(own)] if late is None else layers):
        if layer.names != (own[at] if at < len(own) else late):
            raise _moved(layer, at, "and nothing known in config.json says which layers are of its kind")
    if late is None and len(layers) != len(own):
        what = f"slices: {len(layers)} layers in place of {len(own)}, and nothing known in config.json says which"
        raise ModelError(f"{what} are of which kind", _HINT)


def _moved(layer: Layer, at: int, why: str) -> ModelError:
    return ModelError(f"slices: {layer} would be layer {at}, {why}", _HINT)


def _counting(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """The part of a config that counts the layers, and the key it stands under (None: the config itself)."""
    nested = config.get("text_config")
    if isinstance(nested, Mapping) and _length(config) is None:
        return nested, "text_config"
    return config, None


def _is_no_list(key: str) -> bool:
    return any(word in key for word in _NO_LIST)


def _length(part: Mapping[str, Any]) -> int | None:
    listed = part.get(_ITSELF)
    return next(
        (part[key] for key in COUNTS if type(part.get(key)) is int and 0 <= part[key] < _MANY),
        len(listed) if isinstance(listed, list) else None,
    )


def _told(part: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What a config says of each layer, by the keys that say something of single layers."""
    length = _length(part) or 0
    unwritten = {} if "layer_types" in part else _UNWRITTEN.get(str(part.get("model_type")), {})
    told: dict[str, list[Any]] = {}
    for key, value in {**unwritten, **part}.items():
        counts = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if key in _NUMBERS and isinstance(value, list):
            told[key] = [at in value for at in range(length)]
        elif key == "block_types" and isinstance(value, list) and value:  # repeated over the layers
            told[key] = [value[at % len(value)] for at in range(length)]
        elif key == "attention_types" and complaint(value, _TIMES) is None:  # [[[kind, ...], times], ...]
            told[key] = [one for kinds, times in value for one in kinds * min(times, length)]
        elif isinstance(value, list) or (isinstance(value, str) and key.endswith("pattern")):
            if len(value) == length and not _is_no_list(key):
                told[key] = list(value)
        elif counts and key in _FIRST and (key != "max_window_layers" or part.get("use_sliding_window")):
            told[key] = [at < value + _FIRST[key] for at in range(length)]
        elif counts and key in _LAST:
            told[key] = [at >= length - value for at in range(length)]
        elif counts and key in _EVERY and value:
            shift = _EVERY[key]
            off = part.get(shift) if isinstance(shift, str) else -shift
            told[key] = [(at - (off if type(off) is int else 0)) % value == 0 for at in range(length)]
    return told


def _as_written(key: str, value: Any, wanted: list[Any]) -> Any:
    """The value of `key` that says `wanted` of the layers; of a rule, the nearest one."""
    count = len(wanted)
    if key in _NUMBERS:
        return [at for at, one in enumerate(wanted) if one]
    if key == "attention_types":
        return [[wanted, 1]]
    if isinstance(value, str):
        return "".join(map(str, wanted))
    if isinstance(value, list):
        return wanted
    if key in _FIRST:
        first = wanted.index(False) if False in wanted else max(count, value + _FIRST[key])
        return first - _FIRST[key]
    if key in _LAST:
        return wanted[::-1].index(False) if False in wanted else count
    return value
