"""Models of many architectures in memory give what transformers gives, also those that read a layer's weights."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mergebench.evaluation import Candidate, evaluate_models, load_suite
from mergebench.networks.network import Network
from mergebench.networks.onednn import PackedLinear
from tests.evaluation.conftest import Files
from tests.language import write_decoder, write_rows

CPU = torch.device("cpu")
TEXT = "the bird eats under water"
TINY: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "n_inner": 48, "num_hidden_layers": 2, "num_layers": 2,
    "n_layer": 2, "n_layers": 2, "decoder_layers": 2, "encoder_layers": 2, "num_attention_heads": 4, "n_head": 4,
    "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.3,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "state_size": 8, "conv_kernel": 4,
    "time_step_rank": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "attention_hidden_size": 32, "rotary_dim": 4,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "rescale_every": 1, "context_length": 64, "n_group": 1, "topk_group": 1, "sliding_window": 16,
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
READ_OTHERWISE = ("mamba", "falcon_mamba", "jamba", "rwkv")


def tiny(model_type: str, seed: int = 0) -> Any:
    """A random causal model of an architecture, two layers deep."""
    known = transformers.AutoConfig.for_model(model_type).to_dict()
    config = transformers.AutoConfig.for_model(model_type, **{key: TINY[key] for key in TINY if key in known})
    with torch.device("meta"):
        size = sum(one.numel() for one in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > 3_000_000:
        raise ValueError(f"{model_type}: {size} parameters are not tiny")
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for one in model.parameters():
            one.add_(torch.randn(one.shape) * 0.05)
    return model


def logits(module: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = module(ids).logits
    return found


@pytest.mark.parametrize("model_type", READ_OTHERWISE)
def test_a_model_that_reads_the_weights_of_a_layer(model_type: str, tmp_path: Path, one_thread: None) -> None:
    ids = torch.tensor([[5, 9, 100, 7, 30]])
    for seed, name in enumerate("ab"):
        tiny(model_type, seed).save_pretrained(tmp_path / name)
    first, second = (Files(tmp_path / name) for name in "ab")
    plain = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab"]
    network = Network(first, "AutoModelForCausalLM", CPU)
    torch.testing.assert_close(logits(network.module, ids), logits(plain[0], ids), rtol=1e-4, atol=1e-4)
    kept = [one for one in network.module.modules() if isinstance(one, PackedLinear)]
    assert any(one.packed is None for one in kept) and any(one.packed is not None for one in kept)
    taken = network.take(second)  # not where experts were fused, or weights scaled in running
    assert taken == (model_type in ("mamba", "falcon_mamba"))
    if not taken:
        network = Network(second, "AutoModelForCausalLM", CPU)
    torch.testing.assert_close(logits(network.module, ids), logits(plain[1], ids), rtol=1e-4, atol=1e-4)


def test_padding_where_the_config_names_no_token(tmp_path: Path, one_thread: None) -> None:
    tiny("rwkv").save_pretrained(tmp_path / "a")
    states, mask = Network(Files(tmp_path / "a"), "AutoModel", CPU).encode([[5, 9, 100], [5]])
    assert states.shape == (2, 3, 32) and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    alone, _ = Network(Files(tmp_path / "a"), "AutoModel", CPU).encode([[5]])
    torch.testing.assert_close(states[1, :1], alone[0])


def bits(directory: Path) -> float:
    """Bits per byte by transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([[0, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]])
    logs = logits(model, ids[:, :-1]).log_softmax(-1)
    return -logs[0].gather(1, ids[0, 1:, None]).sum().item() / math.log(2) / len(TEXT.encode())


@pytest.mark.slow
def test_every_causal_architecture(tmp_path: Path, one_thread: None) -> None:
    """All that a config of a few numbers makes tiny; the others are not tried."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = write_rows(tmp_path / "texts.jsonl", [{"id": 1, "text": TEXT}])
    suite = load_suite({"tasks": [{"name": "one", "kind": "perplexity", "data": str(text)}]})
    tokenizer = [*write_decoder(tmp_path / "tokenizer").glob("token*")]
    tried, wrong = [], []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        directory = tmp_path / model_type
        try:
            tiny(model_type).save_pretrained(directory)
            for file in tokenizer:
                shutil.copy(file, directory)
            expected = bits(directory)
        except Exception:  # transformers does not build, save or run it by itself
            continue
        tried.append(model_type)
        try:
            (record,) = evaluate_models([Candidate("m", "base", Files(directory))], suite).records
        except Exception as error:
            wrong.append(f"{model_type}: {error}")
            continue
        if not math.isclose(record.value, expected, rel_tol=1e-4):
            wrong.append(f"{model_type}: {record.value} for {expected}")
    assert not wrong
    assert len(tried) > 60 and set(READ_OTHERWISE) <= set(tried)
