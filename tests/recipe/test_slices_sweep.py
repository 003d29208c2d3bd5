"""Slices of every architecture that transformers builds small. The oracle is transformers: which tensors a forward pass
reads before the first layer and after the last, and which layers its class builds from the config that slices write."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mergebench.checkpoint.names import layer_of
from mergebench.errors import ModelError
from mergebench.recipe.ends import comes_before
from mergebench.recipe.layers import Layer, follow

pytestmark = pytest.mark.slow
LAYERS = 4
SMALL = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "lru_width", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "vocab_size": 96,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "topk_group": 1,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "embedding_size": 16,
    "rotary_dim": 4,
    "state_size": 4,
    "sliding_window": 8,
    "tie_word_embeddings": False,
}
PLAIN = {"head_dim", "num_key_value_heads"}
CHOICES = ([0, 1], [0, 1, 1, 2, 3], [0, 1, 2, 3, 2, 3], [1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3])
LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "attention_layers")


def architectures() -> dict[str, str]:
    from transformers.models.auto import modeling_auto as auto

    return {**auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


def small(kind: str, leave: set[str]) -> Any:
    """The type's config with few and narrow layers."""
    import transformers

    config = transformers.CONFIG_MAPPING[kind]()
    for key, value in SMALL.items():
        if key not in leave and getattr(config, key, None) is not None:
            setattr(config, key, value)
    for key in LISTS:
        value = getattr(config, key, None)
        if isinstance(value, list) and value:
            setattr(config, key, ([*dict.fromkeys(value)] * LAYERS)[:LAYERS])
    return type(config).from_dict(json.loads(config.to_json_string()))


def build(name: str, config: Any, device: str) -> torch.nn.Module:
    import transformers

    with torch.device(device):
        model: torch.nn.Module = getattr(transformers, name)(config)
    return model


def layers_of(model: torch.nn.Module) -> dict[tuple[str, int], frozenset[str]]:
    found: dict[tuple[str, int], set[str]] = {}
    for name in model.state_dict():
        layer = layer_of(name)
        if layer is not None:
            found.setdefault(layer[:2], set()).add(layer[2])
    return {layer: frozenset(names) for layer, names in found.items()}


class Reads(TorchFunctionMode):
    """Records when each tensor of a model is read for the first time."""

    def __init__(self, model: torch.nn.Module, stack: str) -> None:
        super().__init__()
        tensors = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
        self.names = {id(tensor): name for name, tensor in reversed(tensors.items())}
        self.before, self.first = True, dict[str, bool]()
        model.get_submodule(f"{stack}.0" if stack else "0").register_forward_pre_hook(self.begin)

    def begin(self, *_: Any) -> None:
        self.before = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            shape = function.__name__ == "__get__" and function.__self__.__name__ not in ("T", "mT")
            if isinstance(leaf, torch.Tensor) and id(leaf) in self.names and not shape and function.__name__ != "dim":
                self.first.setdefault(self.names[id(leaf)], self.before)
        return function(*args, **(kwargs or {}))


def each(check: Any) -> int:
    """Check every architecture that can be built small and has one stack of layers; their number."""
    count = 0
    for kind, name in architectures().items():
        for leave in (set(), PLAIN):
            try:
                with warnings.catch_warnings(action="ignore"):
                    config = small(kind, leave)
                    model = build(name, config, "meta")
                    stacks = {stack for stack, _ in layers_of(model)}
                    size = sum(tensor.numel() for tensor in model.parameters())
                    done = len(stacks) == 1 and size < 3e7 and check(kind, name, config, model, *stacks)
            except Exception:  # this config is not one of the class, or a package is missing
                continue
            count += bool(done)
            break
    return count


def test_the_ends_are_those_of_the_forward_pass() -> None:
    def check(kind: str, name: str, config: Any, _: Any, stack: str) -> bool:
        model = build(name, config, "cpu").eval()
        with torch.no_grad(), Reads(model, stack) as reads:
            model(input_ids=torch.tensor([[5, 6, 7, 8]]))
        if reads.before:
            return False  # its layers are called otherwise
        outside = {name: before for name, before in reads.first.items() if layer_of(name) is None}
        found = {name: comes_before(name, kind) for name in outside if "rotary" not in name}
        if found != {name: outside[name] for name in found}:
            pytest.fail(f"{kind}: {found} for {outside}")
        return True

    assert each(check) > 90


def test_the_config_describes_the_layers() -> None:
    """Where slices are not refused, the class built from the config they write has the layers that they chose."""
    refused = []

    def check(kind: str, name: str, config: Any, model: Any, stack: str) -> bool:
        written = json.loads(config.to_json_string())
        kinds = layers_of(model)
        known = [Layer("m", written, at, kinds[stack, at]) for at in range(len(kinds))]
        for chosen in CHOICES if len(known) == LAYERS else ():
            try:
                changes = follow([known[at] for at in chosen], known)
            except ModelError:
                refused.append(kind)
                continue
            changed = type(config).from_dict({**written, **changes})
            made = layers_of(build(name, changed, "meta"))
            if [made.get((stack, at)) for at in range(len(made))] != [kinds[stack, at] for at in chosen]:
                pytest.fail(f"{kind}: {chosen}: other layers by {changes}")
            for key in LISTS:
                value, after = getattr(config, key, None), getattr(changed, key, None)
                told = isinstance(value, list) and len(value) == LAYERS
                if told and after != [value[at] for at in chosen]:
                    pytest.fail(f"{kind}: {chosen}: {key} {after}")
        return len(known) == LAYERS

    assert each(check) > 90
    plain = {"llama", "qwen3", "mistral", "mixtral", "gpt2", "gpt_neox", "gemma2"}
    assert not (plain | {"lfm2", "nemotron_h"}) & set(refused)
