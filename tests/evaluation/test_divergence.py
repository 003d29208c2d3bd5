"""Divergence tasks: the KL divergence by its formula, on the logits that transformers gives text by text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergebench.errors import MergebenchError
from mergebench.evaluation import Candidate, Record, evaluate_models, load_suite
from tests.evaluation.conftest import Files
from tests.language import write_decoder, write_texts


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    monkeypatch.chdir(tmp_path)
    write_decoder(tmp_path / "base")
    write_decoder(tmp_path / "other")
    tensors = {name: tensor * 1.1 for name, tensor in load_file("other/model.safetensors").items()}
    save_file(tensors, "other/model.safetensors", metadata={"format": "pt"})
    write_texts(tmp_path / "data.jsonl", count=7, longest=9)
    return tmp_path


def measure(place: Path, **more: object) -> Record:
    entry = {"name": "d", "kind": "divergence", "data": "data.jsonl", "reference": "base", **more}
    (record,) = evaluate_models([Candidate("m", "base", Files(place))], load_suite({"tasks": [entry]})).records
    return record


@pytest.mark.parametrize(("positions", "max_length"), [(3, 128), (100, 5)])
def test_it_is_the_formula(positions: int, max_length: int, here: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = measure(here / "other", positions=positions, max_length=max_length)
    tokenizer = AutoTokenizer.from_pretrained("base")
    base, other = (AutoModelForCausalLM.from_pretrained(place) for place in ("base", "other"))
    text = load_suite({"tasks": [{"name": "d", "kind": "divergence", "data": "data.jsonl", "reference": "base"}]})
    for item, asked in text.tasks[0].ready.asked.items():
        row = next(line for line in Path("data.jsonl").read_text().splitlines() if f'"{item}"' in line)
        ids = torch.tensor([tokenizer(json.loads(row)["text"])["input_ids"][:max_length]])
        with torch.inference_mode():
            p, q = (model(ids).logits[0, -positions:].double().softmax(-1) for model in (base, other))
        assert record.predictions[item].score == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
        assert asked.text
    assert (record.metric, record.direction, record.n) == ("kl", "lower", 7)
    assert record.value == pytest.approx(sum(one.score for one in record.predictions.values()) / 7)


def test_a_model_does_not_differ_from_itself(here: Path) -> None:
    assert measure(here / "base").value == pytest.approx(0, abs=1e-9)


def test_other_tokens_are_refused(here: Path) -> None:
    write_decoder(here / "chat", template="{{ messages }}")
    (here / "chat" / "tokenizer.json").write_text((here / "chat" / "tokenizer.json").read_text().replace("é", "è"))
    with pytest.raises(MergebenchError, match="its tokens are others than those of base"):
        measure(here / "chat")
