"""Adapters on tiny models of any class, made by PEFT; what PEFT's merge makes of them is the oracle."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from models import read_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergebench
from mergebench.deltas.open import open_model

CLOSE = 2e-6  # of a tensor's largest element
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA: dict[str, Any] = {**SIZES, "vocab_size": 48, "num_key_value_heads": 1, "max_position_embeddings": 32}
MIXTRAL: dict[str, Any] = {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": transformers.LlamaConfig(**LLAMA),
    "tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "mixtral": transformers.MixtralConfig(**MIXTRAL),
    "square": transformers.MixtralConfig(**{**MIXTRAL, "intermediate_size": 16}),
    "gpt_oss": transformers.GptOssConfig(**LLAMA, head_dim=8, num_local_experts=3, num_experts_per_tok=2),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **LLAMA, head_dim=8, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12
    ),
    "gpt2": transformers.GPT2Config(vocab_size=48, n_positions=16, n_embd=16, n_layer=2, n_head=2),
    "bert": transformers.BertConfig(**SIZES, vocab_size=48),
    "whisper": transformers.WhisperConfig(
        vocab_size=48, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=20,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    ),
    "vit": transformers.ViTConfig(**SIZES, image_size=16, patch_size=4),
}  # fmt: skip


def save_base(folder: Path, family: str, auto: Any = transformers.AutoModelForCausalLM, **how: Any) -> None:
    torch.manual_seed(0)
    auto.from_config(CONFIGS[family]).save_pretrained(folder / "base", **how)


def randomise(model: torch.nn.Module, noise: float = 0.2) -> None:
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(noise * torch.randn_like(value))


def save_lora(folder: Path, auto: Any = transformers.AutoModelForCausalLM, **settings: Any) -> None:
    """Save an adapter on folder/base, all its parameters random, and fold it with PEFT after loading it again."""
    keep = {key: settings.pop(key) for key in ("save_embedding_layers", "base") if key in settings}
    with warnings.catch_warnings(action="ignore"):
        torch.manual_seed(1)
        model = get_peft_model(auto.from_pretrained(folder / "base"), LoraConfig(**settings))
        randomise(model)
        model.save_pretrained(folder / "lora", **{"save_embedding_layers": False, **keep})
        fold_with_peft(folder, auto)


def fold_with_peft(folder: Path, auto: Any = transformers.AutoModelForCausalLM) -> None:
    with warnings.catch_warnings(action="ignore"):
        again = PeftModel.from_pretrained(auto.from_pretrained(folder / "base"), folder / "lora")
        again.merge_and_unload().save_pretrained(folder / "folded")


def change(folder: Path, **config: Any) -> None:
    """Change settings of the adapter's config; None takes one out."""
    file = folder / "lora" / "adapter_config.json"
    found = {**json.loads(file.read_text()), **config}
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "lora" / "adapter_model.safetensors")


def write(folder: Path, factors: dict[str, Tensor]) -> None:
    save_file({name: value.contiguous() for name, value in factors.items()}, folder / "lora/adapter_model.safetensors")


def merged(folder: Path, out: str = "out") -> dict[str, Tensor]:
    """BASE+LORA merged by a recipe, in chunks."""
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{folder / 'base'}+{folder / 'lora'}"}]}
    return read_model(mergebench.run(mergebench.plan(mergebench.load(recipe), device="cpu"), folder / out).out)


def same(found: dict[str, Tensor], expected: dict[str, Tensor], base: dict[str, Tensor]) -> set[str]:
    """Tensors that are as the base's to the bit, where they should be; the others close. Returns the changed ones."""
    assert found.keys() == expected.keys()
    changed = {name for name in expected if name not in base or not torch.equal(base[name], expected[name])}
    assert changed
    for name, value in found.items():
        if name not in changed:
            assert torch.equal(value, base[name]), name
        worst = float((value.double() - expected[name].double()).abs().max())
        assert worst <= CLOSE * float(expected[name].abs().max()), f"{name}: {worst:.3g}"
    return changed


def check(folder: Path) -> set[str]:
    """BASE+LORA is what PEFT folded, as a whole and merged in chunks; returns the changed tensors."""
    expected, base = read_model(folder / "folded"), read_model(folder / "base")
    whole = open_model(f"{folder / 'base'}+{folder / 'lora'}").state_dict()
    same(whole, expected, base)
    return same(merged(folder), expected, base)
