"""Recipes about tokens that mergekit 0.1.5 was run with, and the tiny models; its results lie beside, as
mergekit_tokens.safetensors (embeddings and heads) and mergekit_tokens.json (tokens and their ids).

Made by benchmarks/make_golden_tokens.py; models and tokenizers come from seeds and lists, so that only results
are stored.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from mergekit_cases import CONFIG, WIDTH, shapes
from numpy.typing import NDArray

# words of each tokenizer in the order of their ids, then the tokens added to it, then rows without a token
WORDS = {
    "base": [*(f"b{i}" for i in range(12)), *(f"all{i}" for i in range(10))],
    "left": [*(f"all{i}" for i in range(9, -1, -1)), *(f"b{i}" for i in range(0, 12, 3)), "ours0", "left0", "<r>"],
    "right": [*(f"all{i}" for i in range(8)), "right0", "ours1", "ours0", *(f"b{i}" for i in range(12))],
}
ADDED = {"base": ["<s>", "<pad>"], "left": ["<s>", "<l>", "ours1"], "right": ["<pad>", "<s>", "<r>"]}
UNUSED = {"base": 5, "left": 0, "right": 3}
MODELS = tuple(WORDS)
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def vocabulary(model: str) -> int:
    """How many rows the embedding of a model has."""
    return 1 + len(WORDS[model]) + len(ADDED[model]) + UNUSED[model]


def tensors(model: str) -> dict[str, NDArray[np.float32]]:
    """A model's tensors; those of the layers are near each other."""
    number, made = MODELS.index(model), {}
    for place, (name, shape) in enumerate(shapes().items()):
        size = (vocabulary(model), WIDTH) if name in VOCABULARY else shape
        made[name] = np.random.Generator(np.random.PCG64([7, number, place])).standard_normal(size).astype(np.float32)
    return made


def write_models(folder: Path) -> None:
    """Put every model into `folder`, with its tokenizer, each in a directory of its own."""
    from safetensors.numpy import save_file
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    for model in MODELS:
        words = ["<unk>", *WORDS[model]]
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        tokenizer.add_tokens([AddedToken(token, special=token == "<s>") for token in ADDED[model]])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder / model)
        save_file(tensors(model), folder / model / "model.safetensors", metadata={"format": "pt"})
        config = CONFIG | {"vocab_size": vocabulary(model)}
        (folder / model / "config.json").write_text(json.dumps(config), encoding="utf-8")


LINEAR = "merge_method: linear\ndtype: float32\n"
TIES = "merge_method: task_arithmetic\ndtype: float32\nbase_model: base\n"
BOTH = "models: [{model: left, parameters: {weight: 0.3}}, {model: right, parameters: {weight: 0.9}}]\n"
BASED = "base_model: base\nmodels: [{model: base, parameters: {weight: 0.5}}, {model: left, parameters: {weight: 0.2}}, {model: right, parameters: {weight: 0.9}}]\n"  # noqa: E501
TOKENS = """\
tokenizer:
  source: union
  pad_to_multiple_of: 20
  tokens:
    <r>: {source: right}
    <l>: {source: {kind: zero}, force: true}
    ours0: {source: {kind: model_token, model: left, token: left0}}
    b1: {source: {kind: model_token, model: right, token_id: 9}, force: true}
    all3: {source: left, force: true}
    fresh: {source: {kind: model_token, model: base, token: b2}}
"""
CASES = {
    "base": LINEAR + BASED + "tokenizer_source: base\n",
    "union": LINEAR + BASED + "tokenizer_source: union\n",
    "left": LINEAR + BASED + "tokenizer_source: left\n",
    "right-padded": LINEAR + BASED + "tokenizer: {source: right, pad_to_multiple_of: 32}\n",
    "task-vectors": TIES + BOTH + "tokenizer: {source: union}\n",
    "no-base": LINEAR + BOTH + "tokenizer_source: right\n",
    "tokens": LINEAR + BASED + TOKENS,
    "tokens-of-model": TIES + BOTH + TOKENS.replace("source: union", "source: right"),
}
