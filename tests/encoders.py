"""A tiny encoder on disk, written by the libraries users have."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = [f"w{number}" for number in range(60)]
HIDDEN = 16


def write_encoder(directory: Path, family: str = "bert", seed: int = 0) -> Path:
    """A random encoder of two layers with a word-level tokenizer, saved the transformers way."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    sizes = {
        "vocab_size": len(vocabulary), "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 1, "initializer_range": 0.4,
    }  # fmt: skip
    torch.manual_seed(seed)
    if family == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=len(vocabulary), dim=HIDDEN, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=40,
            pad_token_id=1, initializer_range=0.4,
        )  # fmt: skip
        model = transformers.DistilBertModel(config)
    elif family == "bert with a head":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    elif family == "roberta":  # positions are counted from the padding id
        model = transformers.RobertaModel(transformers.RobertaConfig(**sizes))
    elif family == "mixtral":  # expert by expert in the file, fused in memory
        model = transformers.MixtralModel(
            transformers.MixtralConfig(**sizes, num_local_experts=2, num_key_value_heads=1)
        )
    else:
        model = transformers.BertModel(transformers.BertConfig(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers begins with zeros, which would hide a lost bias
                parameter.normal_(std=0.2)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
