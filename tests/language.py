"""A tiny causal language model and the data of its tasks on disk, for the tests of language-model tasks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

WORDS = ["a", "bird", "cat", "dog", "eats", "é", "fish", "the", "under", "water", "\n", "?", "says"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def write_decoder(directory: Path, seed: int = 0, template: str | None = None) -> Path:
    """A random Llama of two layers that reads bytes, saved the transformers way."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<s>", "</s>", *letters])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=template
    )
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=192, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        initializer_range=0.5, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def some_text(source: random.Random, longest: int) -> str:
    return " ".join(source.choices(WORDS, k=source.randint(1, longest)))


def write_questions(path: Path, count: int = 17, seed: int = 3) -> Path:
    """Questions with two to four choices of different lengths; the answer is a number or a text."""
    source = random.Random(seed)
    rows = []
    for number in range(count):
        choices = [f"{some_text(source, 3).strip()} {i}" for i in range(source.randint(2, 4))]
        right = source.randrange(len(choices))
        answer = right if number % 2 else choices[right]
        rows.append(
            {"id": f"q{number}", "question": f"q{number} {some_text(source, 8)}", "choices": choices, "answer": answer}
        )
    return write_rows(path, rows)


def write_texts(path: Path, count: int = 11, seed: int = 4, longest: int = 60) -> Path:
    """Texts, some of them longer than the model reads at once."""
    source = random.Random(seed)
    return write_rows(path, ({"id": f"t{n}", "text": f"w{n} {some_text(source, longest)}"} for n in range(count)))


def write_prompts(path: Path, count: int = 9, seed: int = 5) -> Path:
    source = random.Random(seed)
    rows = ({"id": f"p{n}", "prompt": f"{n} {some_text(source, 6)}", "target": "x"} for n in range(count))
    return write_rows(path, rows)
