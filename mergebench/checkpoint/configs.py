"""What two configs say differently about the same numbers: rotary bases, heads, activations, norms, scale factors.

Keys about sizes are left to the tensors' shapes, and keys about training, generation, speed or storage say nothing
here. Of keys that only one config has, those about rotary embeddings count; the others have defaults unknown here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mergebench.checkpoint.model import Model
from mergebench.errors import ModelError

_SILENT = re.compile(
    r"_.*|architectures|auto_map|.*token.*|(torch_)?dtype|.*version|.*drop.*|.*init.*|.*(id2label|label2id|labels)"
    r"|problem_type|finetuning_task|task_specific_params|output_.*|return_dict.*|torchscript|pretraining_tp|.*_coef"
    r"|.*loss.*|gradient_checkpointing|.*quantization.*|compression_config|.*(max_)?position(_embedding)?s|n_ctx"
    r"|(model_)?max_(seq|len).*|min_length|seq_length|.*attn_impl.*|.*flash.*|.*kernels?|.*jitter.*|chunk_size.*"
    r"|use_cache|vocab_size.*|.*_bias|bias|summary_.*|temperature|top_[kp]|typical_p|do_sample|num_(beam|return).*"
    r"|.*penalty.*|no_repeat.*|early_stopping|prefix|bad_words.*|forced_.*|suppress_.*|unsloth.*|.*name_or_path"
    r"|pruned_heads|num_logits_to_keep|time_step_(min|max|floor|rank|scale)|rescale_prenorm_.*|residual_in_fp32"
    r"|reorder_and_upcast_attn|(num_hidden|num|n|encoder|decoder)_layers?|remove_invalid_values|use_bfloat16"
    r"|(intermediate|pooler_hidden)_size|slow_but_exact|use_associative_scan|use_mambapy|sparse_pred.*"
)
_HEADS = (  # how many heads, how many keys' and values' heads, and how wide
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    ("head_dim", "kv_channels", "d_kv"),
)
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_SAME = {"swish": "silu"}
_PLAIN_ROPE = ("default", "mrope", None)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def disagreement(base: Model, model: Model) -> str | None:
    """A sentence on what the model's config says otherwise than the base's; None if there is nothing to say."""
    ours, theirs = base.config, model.config
    whole = ours.get("model_type") == theirs.get("model_type")
    found = {} if model.is_task_vector else _differences(*((ours, theirs) if whole else alike(ours, theirs)))
    if not found:
        return None
    listed = ", ".join(
        f"{key} {_show(theirs)} ({_show(ours)} in {base.reference})" for key, (ours, theirs) in found.items()
    )
    return f"its config.json gives the numbers another meaning: {listed}; the result has that of {base.reference}"


def check_heads(base: Model, model: Model, wanted: Callable[[str], bool]) -> None:
    """`ModelError` if the same attention matrices are cut into other heads in the model than in the base.

    wanted: whether a tensor is merged.
    """
    if model.is_task_vector or not base.config or not model.config:
        return
    ours, theirs = alike(base.config, model.config)
    pairs = [(key, _heads(ours)[at], _heads(theirs)[at]) for at, (key, *_) in enumerate(_HEADS)]
    other = [f"{key} {b} against {a}" for key, a, b in pairs if None not in (a, b) and a != b]
    if not other:
        return
    shapes = [
        (info.shape, model.tensors[name].shape)
        for name, info in base.tensors.items()
        if name in model.tensors and _ATTENTION.search(name) and wanted(name)
    ]
    if shapes and all(a == b for a, b in shapes):
        what = f"{model.reference} cuts the same matrices into other heads than {base.reference}: {', '.join(other)}"
        hint = "if a config.json is wrong, correct it; to merge the rest, exclude the attention, as ['*attn*']"
        raise ModelError(what, hint)


def alike(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts of two configs that describe the same kind of model: one config may be a part of the other."""
    parts = [
        [found for key in ("text_config", "vision_config") if isinstance(found := config.get(key), dict)]
        for config in (ours, theirs)
    ]
    pairs = [(left, right) for left in [*parts[0], ours] for right in [*parts[1], theirs]]
    same = (pair for pair in pairs if pair[0].get("model_type") == pair[1].get("model_type"))
    return next(same, pairs[0])


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The base's and the model's value of every key that they say differently, nested keys with dots."""
    if not ours or not theirs:
        return {}
    pair = [dict(_said(one)) for one in (ours, theirs)]
    found = {}
    for key in {**pair[0], **pair[1]}:
        unsaid = 10000.0 if key.endswith("rope_theta") else None
        a, b = (said.get(key, unsaid) for said in pair)
        both = (key in pair[0] and key in pair[1]) or "rope_" in key
        lengths = {len(value) for value in (a, b) if isinstance(value, list)}
        if a != b and both and len(lengths) < 2:  # lists of layers differ with their number
            found[key] = (a, b)
    return found


def _said(config: Mapping[str, Any], under: str = "") -> Iterator[tuple[str, Any]]:
    """What a config says about its numbers, by keys that mean the same in older and in newer files."""
    unused = ("sliding_window", "max_window_layers") if config.get("use_sliding_window") is False else ()
    parts = (config.get("rope_scaling"), config.get("rope_parameters"))
    rope = {key: value for part in parts if isinstance(part, Mapping) for key, value in part.items()}
    for key, value in config.items():
        if key in ("rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor") or key in unused:
            continue
        if isinstance(value, Mapping) and not _SILENT.fullmatch(key):
            yield from _said(value, f"{under}{key}.")
        elif not _SILENT.fullmatch(key):
            yield under + key, _SAME.get(value, value) if isinstance(value, str) else value
    if rope or "rope_theta" in config:
        kinds = {key: value for key, value in rope.items() if isinstance(value, Mapping)} or {"": rope}
        for kind, values in kinds.items():  # by kinds of layers in some models, older ones have two bases
            inner = under if kind in ("", "full_attention") else f"{under}rope_parameters.{kind}."
            theta = values.get("rope_theta", config.get("rope_theta", 10000.0))
            yield f"{under}rope_local_base_freq" if kind == "sliding_attention" else f"{inner}rope_theta", theta
            name = values.get("rope_type", values.get("type"))
            scaling = {**values, "rope_type": name} if name not in _PLAIN_ROPE else {}
            for key in [key for key in scaling if key not in ("rope_theta", "type", "partial_rotary_factor")]:
                yield f"{inner}rope_scaling.{key}", scaling[key]
            share = values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
            if share is not None:
                yield f"{inner}partial_rotary_factor", share


def _heads(config: Mapping[str, Any]) -> list[Any]:
    """The numbers of heads, with their usual defaults; None where nothing is known."""
    number, groups, wide = (next((config[key] for key in keys if config.get(key)), None) for keys in _HEADS)
    width = next((config[key] for key in _WIDTHS if config.get(key)), None)
    if isinstance(number, int) and isinstance(width, int):
        wide = wide or width // max(number, 1)
    return [number, groups or number, wide]


def _show(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
