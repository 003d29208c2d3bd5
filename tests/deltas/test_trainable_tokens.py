"""Trainable tokens: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TrainableTokensConfig
from safetensors.torch import load_file, save_file

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types
from tests.deltas.test_lora import LLAMA

TIED = copy.deepcopy(LLAMA)
TIED.tie_word_embeddings = True
TOKENS = [7, 2, 40]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def _tied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peft_types.FAMILIES, "tied", TIED)


CASES: list[Any] = [
    pytest.param("llama", None, 1, id="embedding"),
    pytest.param("llama", ["embed_tokens", "lm_head"], 2, id="both"),
    pytest.param("llama", ["lm_head"], 1, id="head"),
    pytest.param("tied", None, 1, id="tied"),
    pytest.param("gpt2", ["wte"], 1, id="tied, GPT-2"),
]


@pytest.mark.parametrize(("family", "targets", "count"), CASES)
def test_as_peft_merges(tmp_path: Path, family: str, targets: Any, count: int) -> None:
    deltas = peft_types.check(
        tmp_path, family, TrainableTokensConfig(token_indices=TOKENS, target_modules=targets), close=0
    )
    assert [delta.kind for (delta,) in deltas.values()] == ["replaced_rows"] * count


def _tied_adapter(folder: Path) -> str:
    """On a tied base."""
    peft_types.make(folder, "tied", TrainableTokensConfig(token_indices=TOKENS))
    return f"{folder / 'base'}+{folder / 'adapter'}"


def _rewrite(file: Path, change: Any) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("saved", [True, False])
def test_a_tied_head_that_the_base_stores(tmp_path: Path, saved: bool) -> None:
    """Whether the adapter holds the head's rows, as PEFT saves them now, or not."""
    reference = _tied_adapter(tmp_path)
    _rewrite(tmp_path / "base" / "model.safetensors", lambda all: all | {HEAD: all[EMBEDDING].clone()})
    if not saved:
        _rewrite(
            tmp_path / "adapter" / "adapter_model.safetensors",
            lambda all: {name: value for name, value in all.items() if "lm_head" not in name},
        )
    state = open_model(reference).state_dict()
    expected = load_file(tmp_path / "folded" / "model.safetensors")[EMBEDDING]
    assert torch.equal(state[EMBEDDING], expected) and torch.equal(state[HEAD], expected)


REFUSED: list[Any] = [
    pytest.param("lm_head", lambda rows: rows + 1, {}, "no tensor 'lm_head.weight'", id="a tied head of its own"),
    pytest.param("embed_tokens", lambda rows: None, {}, "no tensor 'lm_head.weight'", id="a tied head alone"),
    pytest.param("embed_tokens", lambda rows: rows, {"token_indices": [7, 2, 48]}, "rows 2 to 48", id="outside"),
    pytest.param("embed_tokens", lambda rows: rows, {"token_indices": [7, 2, 7]}, "a row twice", id="twice"),
    pytest.param("embed_tokens", lambda rows: rows, {"token_indices": [7]}, r"F32 \[3, 16\], \[1, any\]", id="fewer"),
    pytest.param("embed_tokens", lambda rows: rows, {"token_indices": "7"}, "must be numbers", id="no numbers"),
]


@pytest.mark.parametrize(("name", "change", "settings", "error"), REFUSED)
def test_refused(tmp_path: Path, name: str, change: Any, settings: dict[str, Any], error: str) -> None:
    reference = _tied_adapter(tmp_path)

    def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        (key,) = (key for key in tensors if name in key)
        value = change(tensors.pop(key))
        return tensors if value is None else tensors | {key: value}

    _rewrite(tmp_path / "adapter" / "adapter_model.safetensors", changed)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(ModelError, match=error):
        open_model(reference)


def test_the_head_alone_of_a_tied_base_that_stores_it(tmp_path: Path) -> None:
    reference = _tied_adapter(tmp_path)
    _rewrite(tmp_path / "base" / "model.safetensors", lambda all: all | {HEAD: all[EMBEDDING].clone()})
    _rewrite(
        tmp_path / "adapter" / "adapter_model.safetensors",
        lambda all: {name: value for name, value in all.items() if "lm_head" in name},
    )
    with pytest.raises(ModelError, match="the head alone, which the base ties"):
        open_model(reference)
