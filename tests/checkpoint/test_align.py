"""Tensors that one model stores and another does not: the merge is the mean of what transformers loads from each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergebench

SIZES = {"vocab_size": 48, "d_model": 16, "num_layers": 1, "num_heads": 2}
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def llama(tied: bool = True) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )  # fmt: skip


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES, d_kv=8, d_ff=24))


def whisper() -> Any:
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    config = transformers.WhisperConfig(
        vocab_size=48, d_model=16, num_mel_bins=4, max_source_positions=8, max_target_positions=8, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **sides,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def gpt_neo() -> Any:
    config = transformers.GPTNeoConfig(
        vocab_size=48, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]],
        max_position_embeddings=8,
    )  # fmt: skip
    return transformers.GPTNeoForCausalLM(config)


def with_alias(alias: str, of: str) -> Change:
    return lambda tensors: tensors | {alias: tensors[of].clone()}


def with_masks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = torch.tril(torch.ones(1, 1, 8, 8))
    place = "transformer.h.0.attn.attention"
    return tensors | {f"{place}.bias": mask, f"{place}.masked_bias": torch.tensor(-1e9), "any.mask": mask.bool()}


def with_unread_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    copies = {f"{side}.embed_tokens.weight": tensors["shared.weight"].clone() for side in ("encoder", "decoder")}
    return tensors | copies | {name: torch.randn(32, 2)}


def write(make: Callable[[], Any], directory: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    make().save_pretrained(directory)
    return directory


def change(directory: Path, of: Change) -> None:
    tensors = of(load_file(directory / "model.safetensors"))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def set_config(directory: Path, **more: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def merge(first: str, second: str, method: str = "linear") -> tuple[Path, list[str]]:
    text = f"merge_method: {method}\nmodels: [{{model: {first}}}, {{model: {second}}}]\nparameters: {{weight: 0.5}}\n"
    text += f"base_model: {first}\n" if method != "linear" else ""
    Path("recipe.yaml").write_text(text)
    result = mergebench.run(mergebench.plan(mergebench.load("recipe.yaml")), "out")
    return result.out, result.provenance["notes"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize(
    ("make", "old", "noted"),
    [
        (whisper, with_alias("proj_out.weight", "model.decoder.embed_tokens.weight"), 0),
        (gpt_neo, with_masks, 1),
        (t5, with_unread_bias, 1),
    ],
)
def test_what_only_one_stores(make: Callable[[], Any], old: Change, noted: int, order: str) -> None:
    directories = [write(make, Path(name), seed) for seed, name in enumerate("ab")]
    change(Path("a"), old)
    out, notes = merge(*order)
    kind = type(make())
    first, second, merged = (kind.from_pretrained(place).state_dict() for place in (*directories, out))
    for name, value in first.items():
        torch.testing.assert_close(merged[name], (value + second[name]) / 2)
    assert len(notes) == noted
    assert all(("copied" if order == "ab" else "left out") in note and note.startswith("a: ") for note in notes)


@pytest.mark.parametrize("method", ["linear", "dare_linear"])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_copies_of_a_shared_embedding_beside_a_separate_head(order: str, method: str) -> None:
    """As Flan-T5 is published, and as transformers saves it today; the flag is about the head."""
    for seed, name in enumerate("ab"):
        write(t5, Path(name), seed)
        change(Path(name), lambda tensors: tensors | {"lm_head.weight": torch.randn(48, 16)})
        set_config(Path(name), tie_word_embeddings=False)
    mine, theirs = (load_file(f"{name}/model.safetensors") for name in "ab")
    change(Path("a"), lambda tensors: with_unread_bias(tensors))
    out, _ = merge(*order, method)
    merged = load_file(out / "model.safetensors")
    for name in mine if method == "linear" else ():
        torch.testing.assert_close(merged[name], (mine[name] + theirs[name]) / 2)
    copies = [merged[name] for name in merged if name.endswith("embed_tokens.weight")]
    assert len(copies) == (2 if order == "ab" else 0)
    assert all(torch.equal(copy, merged["shared.weight"]) for copy in copies)
    if order == "ab":
        Path("recipe.yaml").write_text(Path("recipe.yaml").read_text() + "exclude: ['*coder.embed_tokens.*']\n")
        with pytest.raises(mergebench.MergebenchError, match=r"embed_tokens.weight' is a copy of 'shared.weight'"):
            mergebench.plan(mergebench.load("recipe.yaml"))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_tied_head_and_one_apart(order: str, stored: bool) -> None:
    write(llama, Path("a"), 0)
    write(lambda: llama(tied=False), Path("b"), 1)
    if stored:
        change(Path("a"), with_alias("lm_head.weight", "model.embed_tokens.weight"))
    out, _ = merge(*order)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    first, second, merged = (
        transformers.AutoModelForCausalLM.from_pretrained(place).state_dict() for place in ("a", "b", out)
    )
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    for name, value in first.items():
        torch.testing.assert_close(merged[name], (value + second[name]) / 2)


def test_a_weight_that_only_one_has_is_refused() -> None:
    write(llama, Path("a"), 0)
    shutil.copytree("a", "b")
    change(Path("b"), lambda tensors: tensors | {"model.layers.0.extra.weight": torch.ones(4, 4)})
    for order in ("ab", "ba"):
        with pytest.raises(mergebench.MergebenchError, match=r"extra.weight: b has|extra.weight: a does not have"):
            merge(*order)
