"""The tokens are those of tokenizer.json, whatever class a config names; the oracle is `tokenizers` alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mergebench.errors import ModelError, RunError
from mergebench.evaluation import Candidate, evaluate_models, load_suite
from mergebench.networks.network import Network
from mergebench.networks.tokenizer import load, tokenize
from tests.evaluation.conftest import Files
from tests.language import write_rows

TEXT = "hello world 2023 650841823 merge"
SPECIAL = ["<unk>", "<s>", "</s>"]


def words() -> Tokenizer:
    known = [*SPECIAL, "hello", "world", "2023", "merge", "123"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def digit_groups() -> Tokenizer:
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\d{1,3}|[^\d\s]+|\s+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["hello world 2023", "merge 123 650 841"] * 20, trainer)
    return made


def write(directory: Path, tokenizer: Tokenizer, declared: str) -> Path:
    """A random Llama of two layers with this tokenizer, under the name of a class."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.5,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"tokenizer_class": declared, "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**named, "chat_template": "{{ messages }}"}))
    return directory


@pytest.mark.parametrize(
    ("made", "declared", "differs"),
    [
        (words, "Qwen2Tokenizer", True),
        (words, "PreTrainedTokenizerFast", False),
        (digit_groups, "Qwen2Tokenizer", True),
        (digit_groups, "BertTokenizer", None),  # fails, without a token for what is unknown
        (digit_groups, "GPT2Tokenizer", False),
        (digit_groups, "LlamaTokenizerFast", False),  # transformers itself knows that this class is often wrong
    ],
)
def test_the_file_decides(made: Any, declared: str, differs: bool | None, tmp_path: Path) -> None:
    import transformers

    tokenizer = made()
    found, remark = load(write(tmp_path / "a", tokenizer, declared), "a")
    assert found(TEXT, add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXT, add_special_tokens=False).ids
    built = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")  # by its class
    if differs is not None:
        assert differs == (built(TEXT, add_special_tokens=False)["input_ids"] != tokenizer.encode(TEXT).ids)
    assert found.get_vocab() == tokenizer.get_vocab()
    assert (found.bos_token_id, found.eos_token_id) == (1, 2)
    assert found.chat_template == "{{ messages }}"
    assert (remark is not None and declared in remark) if differs is not False else remark is None


def test_what_is_measured(tmp_path: Path, one_thread: None) -> None:
    import transformers

    directory = write(tmp_path / "a", words(), "Qwen2Tokenizer")
    write_rows(tmp_path / "texts.jsonl", [{"id": 1, "text": TEXT}])
    suite = load_suite({"tasks": [{"name": "one", "kind": "perplexity", "data": str(tmp_path / "texts.jsonl")}]})
    found = evaluate_models([Candidate("m", "base", Files(directory))], suite)

    ids = torch.tensor([[1, *words().encode(TEXT).ids]])
    with torch.no_grad():
        logs = transformers.AutoModelForCausalLM.from_pretrained(directory)(ids).logits.log_softmax(-1)
    bits = -logs[0, :-1].gather(1, ids[0, 1:, None]).sum().item() / math.log(2) / len(TEXT.encode())
    assert found.records[0].value == pytest.approx(bits, rel=1e-5)
    (note,) = found.made["notes"]
    assert note.startswith("m: ") and "Qwen2Tokenizer" in note


def test_a_text_without_tokens(tmp_path: Path) -> None:
    letters = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*SPECIAL, *"helo"])}, []))
    directory = write(tmp_path / "a", letters, "PreTrainedTokenizerFast")
    write_rows(tmp_path / "texts.jsonl", [{"id": 1, "text": TEXT}, {"id": 2, "text": "42"}])
    suite = load_suite({"tasks": [{"name": "one", "kind": "perplexity", "data": str(tmp_path / "texts.jsonl")}]})
    with pytest.raises(RunError, match=r"gives no token for '42'"):
        evaluate_models([Candidate("m", "base", Files(directory))], suite)
    network = Network(Files(directory), "AutoModel", torch.device("cpu"))
    with pytest.raises(RunError, match=r"gives no token for '42'"):
        network.tokenize([TEXT, "42"], 10)


def test_a_tokenizer_that_fails(tmp_path: Path) -> None:
    made = Tokenizer(models.WordPiece({word: number for number, word in enumerate([*SPECIAL, "hello"])}, unk_token="?"))
    directory = write(tmp_path / "a", made, "PreTrainedTokenizerFast")
    with pytest.raises(ModelError, match="model 'a': its tokenizer: WordPiece error: Missing"):
        tokenize(load(directory, "a")[0], "a", ["other"], 10)


def test_no_tokenizer(tmp_path: Path) -> None:
    directory = write(tmp_path / "a", words(), "PreTrainedTokenizerFast")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="it has no tokenizer"):
        load(directory, "a")
