"""Embeddings of one tokenizer, padded to different lengths: by brute force, the rows of each token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mergebench
from mergebench.errors import ModelError
from tests.models import read_model, write_model

TOKENS = 10
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def model(place: Path, rows: int, *, tied: bool = False, words: int = TOKENS) -> dict[str, Tensor]:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    random = torch.Generator().manual_seed(rows)
    tensors = {EMBEDDING: torch.randn(rows, 4, generator=random), "model.norm.weight": torch.ones(4)}
    tensors |= {} if tied else {HEAD: torch.randn(rows, 4, generator=random)}
    config = {
        "hidden_size": 4,
        "model_type": "llama",
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "num_attention_heads": 2,
    }
    write_model(place, tensors, config=config)
    vocabulary = {f"w{number}": number for number in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(place)
    return tensors


def merged(folder: Path, names: list[str], **more: object) -> tuple[dict[str, Tensor], int, list[str]]:
    recipe = {"models": [{"model": str(folder / name)} for name in names], "merge_method": "linear", **more}
    result = mergebench.run(mergebench.plan(mergebench.load(recipe), device="cpu"), folder / "out", overwrite=True)
    size = json.loads((folder / "out/config.json").read_text())["vocab_size"]
    return read_model(folder / "out"), size, result.provenance["notes"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("base", "other"), [(10, 12), (12, 10), (12, 16), (16, 12)])
def test_padding_is_the_bases(tmp_path: Path, base: int, other: int, tied: bool) -> None:
    """The rows that both have are merged, those past them kept; a note says so."""
    one, two = model(tmp_path / "base", base, tied=tied), model(tmp_path / "other", other, tied=tied)
    found, size, notes = merged(tmp_path, ["base", "other"])
    both = min(base, other)
    for name in one.keys() & {EMBEDDING, HEAD}:
        torch.testing.assert_close(found[name][:both], (one[name][:both] + two[name][:both]) / 2)
        assert torch.equal(found[name][both:], one[name][both:])
    assert size == base == len(found[EMBEDDING]) and found.keys() == one.keys()
    done = "those past the base's are left out" if other > base else "those past the tokens are the base's"
    assert notes == [f"other: {other} rows for {TOKENS} tokens, {base} in base: {done}"]


def test_with_a_tokenizer_the_rows_are_its_tokens(tmp_path: Path) -> None:
    model(tmp_path / "base", 16)
    model(tmp_path / "other", 12)
    found, size, notes = merged(tmp_path, ["base", "other"], tokenizer_source="base")
    assert len(found[EMBEDDING]) == size == TOKENS
    assert notes == ["base: 16 rows for tokens become 10: the tokenizer has 10 tokens"]


@pytest.mark.parametrize("words", [9, 11])
def test_other_tokens_are_refused(tmp_path: Path, words: int) -> None:
    model(tmp_path / "base", 12)
    model(tmp_path / "other", 16, words=words)
    with pytest.raises(ModelError) as caught:
        merged(tmp_path, ["base", "other"])
    assert "has [16, 4], base has [12, 4]" in caught.value.message
    assert "tokenizer_source: union" in (caught.value.hint or "")


def test_tokens_without_a_row_are_refused(tmp_path: Path) -> None:
    model(tmp_path / "base", 12, words=12)
    model(tmp_path / "other", 11, words=12)
    with pytest.raises(ModelError, match=r"has \[11, 4\], base has \[12, 4\]"):
        merged(tmp_path, ["base", "other"])
