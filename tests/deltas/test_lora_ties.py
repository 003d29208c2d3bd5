"""Adapters on one half of a tied pair, in models that tie more than a head to an embedding.

The oracle is what PEFT computes before it merges: merging would change the other half, too.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from tests.deltas import lora_models as lora

CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "LukeForMaskedLM": transformers.LukeConfig(
        **lora.SIZES, vocab_size=48, entity_vocab_size=20, entity_emb_size=8, max_position_embeddings=32
    ),
    "T5ForConditionalGeneration": transformers.T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    ),
    "BertForMaskedLM": transformers.BertConfig(**lora.SIZES, vocab_size=48),
}
IDS = torch.arange(2, 12)[None]
INPUTS: dict[str, dict[str, torch.Tensor]] = {
    "LukeForMaskedLM": {
        "entity_ids": torch.tensor([[3, 4]]), "entity_position_ids": torch.tensor([[[1, 2], [3, -1]]]),
    },
    "T5ForConditionalGeneration": {"decoder_input_ids": IDS},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "half"),
    [
        ("LukeForMaskedLM", "entity_predictions.decoder"), ("LukeForMaskedLM", "entity_embeddings.entity_embeddings"),
        ("LukeForMaskedLM", "lm_head.decoder"), ("T5ForConditionalGeneration", "lm_head"),
        ("BertForMaskedLM", "word_embeddings"), ("BertForMaskedLM", "predictions.decoder"),
    ],
)  # fmt: skip
def test_all_that_was_tied_is_stored(tmp_path: Path, kind: str, half: str) -> None:
    made: Any = getattr(transformers, kind)
    with warnings.catch_warnings(action="ignore"):
        torch.manual_seed(0)
        model = made(CONFIGS[kind])
        lora.randomise(model)  # biases, too
        model.save_pretrained(tmp_path / "base")
        lora.save_lora(tmp_path, made, r=3, target_modules=[half])
        adapted = PeftModel.from_pretrained(made.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
        lora.merged(tmp_path)
        folded = made.from_pretrained(tmp_path / "out").eval()
    inputs = {"input_ids": IDS, **INPUTS.get(kind, {})}
    with torch.no_grad():
        ours, theirs = folded(**inputs), adapted(**inputs)
    for name in ("logits", "entity_logits"):
        torch.testing.assert_close(ours.get(name), theirs.get(name), rtol=1e-4, atol=1e-4)
