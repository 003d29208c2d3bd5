"""What the evaluation tests share: tiny real models and tasks on disk, written by the libraries users have."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WORDS = [f"w{number}" for number in range(60)]
LABELS = ("bad", "good", "none")
HIDDEN = 16


@dataclass(frozen=True)
class Files:
    """The least a model must be: its files, read whole."""

    side_directory: Path
    reference: str = "tiny"

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.float() for name, tensor in load_file(self.side_directory / "model.safetensors").items()}


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


def write_head(
    directory: Path, labels: Sequence[str] = LABELS, seed: int = 1, hidden: int = HIDDEN, **metadata: str
) -> Path:
    """`head.safetensors` with random weights; metadata given as "" is left out."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "weight": torch.randn(len(labels), hidden, generator=generator),
        "bias": torch.randn(len(labels), generator=generator),
    }
    about = {
        "pooling": "mean",
        "normalize": "false",
        "max_length": "24",
        "labels": json.dumps(list(labels)),
        **metadata,
    }
    path = directory / "head.safetensors"
    save_file(tensors, path, metadata={name: value for name, value in about.items() if value})
    return path


def write_data(path: Path, count: int = 41, seed: int = 2, longest: int = 30) -> Path:
    """Texts of one to `longest` known and unknown words, with random labels."""
    source = random.Random(seed)
    rows = [
        {
            "id": f"item-{number}",
            "text": " ".join(source.choices([*WORDS, "unknown"], k=source.randint(1, longest))),
            "label": source.choice(LABELS),
        }
        for number in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT; read only."""
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `data.jsonl` and `a/head.safetensors`."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data.jsonl")
    write_head(tmp_path / "a")
    return tmp_path


@pytest.fixture
def entry() -> Callable[..., dict[str, Any]]:
    """One task of a suite as `place` has it; keys given as None are left out."""

    def make(**changes: Any) -> dict[str, Any]:
        whole = {"name": "a", "kind": "text-classification", "data": "data.jsonl", "head": "a/head.safetensors"}
        return {key: value for key, value in {**whole, **changes}.items() if value is not None}

    return make
