"""Every architecture of transformers at a tiny size: configs are shrunk by the names of their fields."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

MOST = 6_000_000  # parameters of a model that is built

# The first pattern that fits a field's name gives its value.
_SIZES: list[tuple[str, Any]] = [
    (r"vocab_size|.*_vocab_size|vocab_size_.*", 128),
    (
        r"(num_)?(hidden|encoder|decoder|text|vision)?_?layers|n_layers?|num_(?!feat_extract|conv_pos).*_layers|.*_num_hidden_layers|depth",
        2,
    ),
    (r"num_key_value_heads|.*kv_heads|n_head_kv|num_kv.*", 2),
    (r".*experts_per_tok|.*top_?k(_experts)?|num_selected_experts|moe_k", 2),
    (r"n_group|topk_group|n_groups|mamba_n_groups", 1),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"(n|num|moe_num)_?(routed|local|total)?_?experts", 4),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (
        r"(num_)?(attention_)?heads|n_heads?|.*_attention_heads|.*_num_heads|num_heads|mamba_n_heads|encoder_num_attention_heads",
        4,
    ),
    (r"head_dim|.*_head_dim|d_kv|attention_head_size|.*_head_size", 8),
    (r"(q|kv|o)_lora_rank|.*_lora_rank|.*_low_rank_dim", 16),
    (r"moe_intermediate_size|.*expert.*intermediate_size|expert_ffn.*|moe_.*_size", 16),
    (r"intermediate_size.*|.*intermediate_size|.*ffn_dim|d_ff|n_inner|ffn_hidden_size|.*mlp_dim|ffn_size", 48),
    (r"(hidden|embedding|embed|projection|text_hidden|vision_hidden|out_hidden)_?(size|dim)|d_model|n_embd|dim", 32),
    (r".*hidden_size(_.*)?|.*_embed_dim|.*_hidden_dim|.*hidden_dim|lru_width|attention_hidden_size|d_embed", 32),
    (r"image_size|crop_size|input_size|img_size", 32),
    (r"patch_size", 8),
    (r"max_position_embeddings|n_positions|.*max_.*positions?(_embeddings)?|n_ctx|max_seq_len", 64),
    (r"mamba_d_state|state_size|ssm_state_size", 8),
    (r"mamba_dt_rank|time_step_rank", 8),
    (r"sliding_window|window_size|attention_window", 16),
    (r"num_mel_bins|codebook_size|num_codebooks|codebook_dim", 16),
]


# tried one after the other where a class rejects the sizes
_WAYS: list[dict[str, Any]] = [
    {}, {"num_key_value_heads": 4}, {"head_dim": 8}, {"num_key_value_heads": 4, "head_dim": 8}, {"head_dim": 16},
    {"layer_types": ["full_attention", "conv"]}, {"attention_types": [[["global", "local"], 1]]},
    {"vocab_size": 40, "pad_token_id": 1}, {"mamba_d_head": 16},
]  # fmt: skip


def shrunk(kind: type[Any]) -> dict[str, Any]:
    """Arguments of a config class that make it tiny."""
    default = kind()
    parts = {name: getattr(default, name, None) for name in getattr(kind, "sub_configs", {})}
    small: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name.startswith("_") or name in parts:
            continue
        if type(value) is int and not re.search("token_id|_id$|_ids$", name):
            fit = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
            if fit is not None and value > fit:
                small[name] = fit
        elif type(value) is int and value >= 128:
            small[name] = 3
    for name, part in parts.items():
        if isinstance(part, transformers.PretrainedConfig):
            small[name] = {**shrunk(type(part)), "model_type": part.model_type}
    return small


def names() -> list[str]:
    """The model types, and one class for each: with a head if there is one."""
    return sorted(_classes())


def _classes() -> dict[str, str]:
    found: dict[str, str] = {}
    for table in (
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
        "MODEL_MAPPING_NAMES",
    ):
        for kind, name in getattr(modeling_auto, table).items():
            found.setdefault(kind, name if isinstance(name, str) else name[0])
    return found


def build(name: str) -> Any:
    """A tiny model of this type with random weights; an exception of transformers if it cannot be built so."""
    kind = getattr(transformers, _classes()[name])
    small, model, errors = shrunk(kind.config_class), None, []
    for way in _WAYS:
        try:
            config = kind.config_class(**{**small, **way})
            with torch.device("meta"):
                model = kind(config)
            break
        except Exception as error:
            errors.append(error)
    if model is None:
        raise errors[0]
    size = sum(value.numel() for value in model.parameters())
    if size > MOST:
        raise ValueError(f"{size} parameters")
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape) * 0.1)
    return model.eval()
