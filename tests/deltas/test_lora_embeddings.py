"""LoRA on embeddings and heads, and single trained tokens: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import read_model, write_model
from peft import PeftModel

import mergebench
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import lora_models as lora

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "r": 3, "lora_alpha": 5}),
    "embedding and head": ("llama", {"target_modules": ["lm_head", "embed_tokens"], "r": 3, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "embed_tokens"], "r": 2, "rank_pattern": {"embed_tokens": 5},
            "alpha_pattern": {"embed_tokens": 3},
        },
    ),
    "positions, Conv1D": ("gpt2", {"target_modules": ["wpe", "c_attn"], "r": 2, "fan_in_fan_out": True}),
    "DoRA": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "r": 3, "use_dora": True}),
    "DoRA, positions": ("gpt2", {"target_modules": ["wpe"], "r": 2, "use_dora": True, "fan_in_fan_out": True}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "r": 2, "trainable_token_indices": [40, 3, 47]}),
    "tokens by name": ("gpt2", {"target_modules": ["c_attn"], "r": 2, "trainable_token_indices": {"wpe": [0, 5]}}),
    "tokens of a tied base": ("tied", {"target_modules": ["q_proj"], "r": 2, "trainable_token_indices": [4, 5]}),
    "the embedding saved with its factors": (
        "llama", {"target_modules": ["q_proj", "embed_tokens"], "r": 3, "save_embedding_layers": True},
    ),
    "embeddings saved unlisted": ("llama", {"target_modules": ["q_proj"], "r": 3, "save_embedding_layers": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_as_peft_merges(tmp_path: Path, case: str) -> None:
    family, settings = CASES[case]
    lora.save_base(tmp_path, family)
    lora.save_lora(tmp_path, **settings)
    names = {"wpe", "wte", "embed_tokens", "lm_head"}
    changed = lora.check(tmp_path)
    assert any(set(name.split(".")) & names for name in changed) or case == "embeddings saved unlisted"


def test_tokens_of_a_head_that_is_stored_twice(tmp_path: Path) -> None:
    lora.save_base(tmp_path, "tied")
    lora.save_lora(tmp_path, target_modules=["q_proj"], r=2, trainable_token_indices=[4, 5])
    base = read_model(tmp_path / "base")
    write_model(tmp_path / "base", base | {"lm_head.weight": base["model.embed_tokens.weight"]}, config=None)
    found = lora.merged(tmp_path)
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"], base["model.embed_tokens.weight"])


HALVES: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("twice", [False, True], ids=["stored once", "stored twice"])
@pytest.mark.parametrize("half", HALVES)
def test_a_tied_head_is_untied(tmp_path: Path, half: str, twice: bool) -> None:
    """What PEFT computes before it merges: merging would change the other half, too."""
    lora.save_base(tmp_path, "tied")
    lora.save_lora(tmp_path, r=3, lora_alpha=6, **HALVES[half])
    if twice:
        base = read_model(tmp_path / "base")
        write_model(
            tmp_path / "base", base | {"lm_head.weight": base["model.embed_tokens.weight"].clone()}, config=None
        )
    lora.merged(tmp_path)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    auto, ids = transformers.AutoModelForCausalLM, torch.arange(2, 12)[None]
    with warnings.catch_warnings(action="ignore"):
        adapted = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    with torch.no_grad():
        logits = auto.from_pretrained(tmp_path / "out").eval()(ids).logits
        torch.testing.assert_close(logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)


def test_an_embedding_adapted_for_its_head_too(tmp_path: Path) -> None:
    lora.save_base(tmp_path, "tied")
    lora.save_lora(tmp_path, r=3, target_modules=["embed_tokens"])
    lora.change(tmp_path, ensure_weight_tying=True)
    folded = open_model(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")
    assert "lm_head.weight" not in folded.tensors and folded.config["tie_word_embeddings"]
    base = read_model(tmp_path / "base")
    write_model(tmp_path / "base", base | {"lm_head.weight": base["model.embed_tokens.weight"]}, config=None)
    with pytest.raises(ModelError, match=r"ensure_weight_tying: the adapter changes 'model\.embed_tokens\.weight' for"):
        lora.merged(tmp_path)


def test_a_head_of_unknown_name(tmp_path: Path) -> None:
    lora.save_base(tmp_path, "tied")
    lora.save_lora(tmp_path, r=3, target_modules=["embed_tokens"])
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["LlamaForPrefixes"]}))
    with pytest.raises(ModelError, match="the base ties its head to it"):
        lora.merged(tmp_path)


def test_a_model_without_a_head(tmp_path: Path) -> None:
    lora.save_base(tmp_path, "bert", transformers.AutoModel)
    lora.save_lora(tmp_path, transformers.AutoModel, r=3, target_modules=["word_embeddings", "query"])
    assert "embeddings.word_embeddings.weight" in lora.check(tmp_path)


def test_untied_and_on_top_of_another(tmp_path: Path) -> None:
    """The head is that of the model with the first adapter."""
    lora.save_base(tmp_path, "tied")
    lora.save_lora(tmp_path, r=3, target_modules=["q_proj"], trainable_token_indices=[4, 5])
    (tmp_path / "lora").rename(tmp_path / "first")
    lora.save_lora(tmp_path, r=3, target_modules=["lm_head"])
    once = open_model(f"{tmp_path / 'base'}+{tmp_path / 'first'}").state_dict()
    alone = open_model(f"{tmp_path / 'base'}+{tmp_path / 'lora'}").state_dict()
    both = open_model(f"{tmp_path / 'base'}+{tmp_path / 'first'}+{tmp_path / 'lora'}").state_dict()
    embedding = "model.embed_tokens.weight"
    torch.testing.assert_close(both[embedding], once[embedding])
    expected = once[embedding] + alone["lm_head.weight"] - alone[embedding]
    torch.testing.assert_close(both["lm_head.weight"], expected)


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [False, True], ids=["factors", "saved whole"])
def test_a_longer_vocabulary(tmp_path: Path, saved: bool) -> None:
    lora.save_base(tmp_path, "llama")
    how = {"modules_to_save": ["embed_tokens"]} if saved else {}
    lora.save_lora(tmp_path, r=2, target_modules=["q_proj"] if saved else ["embed_tokens"], **how)
    base = read_model(tmp_path / "base")
    write_model(tmp_path / "base", base | {"model.embed_tokens.weight": torch.zeros(46, 16)}, config=None)
    with pytest.raises(ModelError, match="it has 48 tokens, the base 46") as caught:
        lora.merged(tmp_path)
    assert "resize the base to 48 tokens" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [([3], "must give [3] tokens"), ([3, 3, 4], "must give"), ([3, -1, 4], "must give"), (None, "must give"),
     ({"wte": [1, 2, 3]}, "must give"), ([3, 4, 48], "it trains token 48, the base has 48")],
)  # fmt: skip
def test_tokens_that_the_config_does_not_name(tmp_path: Path, tokens: Any, said: str) -> None:
    lora.save_base(tmp_path, "llama")
    lora.save_lora(tmp_path, target_modules=["q_proj"], r=2, trainable_token_indices=[40, 3, 47])
    lora.change(tmp_path, trainable_token_indices=tokens)
    with pytest.raises(ModelError) as caught:
        lora.merged(tmp_path)
    assert said in str(caught.value)


def test_half_of_the_factors(tmp_path: Path) -> None:
    lora.save_base(tmp_path, "llama")
    lora.save_lora(tmp_path, target_modules=["embed_tokens"], r=2)
    found = lora.tensors(tmp_path)
    lora.write(tmp_path, {name: value for name, value in found.items() if not name.endswith("_B")})
    with pytest.raises(ModelError, match="only one of lora_embedding_A and lora_embedding_B"):
        lora.merged(tmp_path)


def test_adapters_with_embeddings_merge(tmp_path: Path) -> None:
    """Their factors are written as PEFT reads them; other parts are refused by name."""
    lora.save_base(tmp_path, "llama")
    differences = []
    for name in ("one", "two"):
        torch.manual_seed(len(name) + len(differences))
        lora.save_lora(tmp_path, target_modules=["q_proj", "embed_tokens"], r=2, lora_alpha=3 + len(differences))
        folded = open_model(f"{tmp_path / 'base'}+{tmp_path / 'lora'}").state_dict()
        base = read_model(tmp_path / "base")
        differences.append({name: folded[name] - base[name] for name in base})
        (tmp_path / "lora").rename(tmp_path / name)
    mergebench.merge_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "lora", weights=[1.0, 0.5])
    lora.fold_with_peft(tmp_path)
    for name, value in read_model(tmp_path / "folded").items():
        expected = base[name] + differences[0][name] + 0.5 * differences[1][name]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    lora.check(tmp_path)


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["q_proj"], "trainable_token_indices": [3]},
                 {"target_modules": ["embed_tokens"], "save_embedding_layers": True}],
)  # fmt: skip
def test_other_parts_do_not_merge_as_an_adapter(tmp_path: Path, settings: dict[str, Any]) -> None:
    lora.save_base(tmp_path, "llama")
    lora.save_lora(tmp_path, r=2, **settings)
    with pytest.raises(ModelError, match=r"embed_tokens', .*: only factors of linear layers and embeddings"):
        mergebench.merge_adapters([tmp_path / "lora"] * 2, tmp_path / "both")
