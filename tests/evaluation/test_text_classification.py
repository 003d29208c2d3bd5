"""Batched, padded, threaded measuring equals one text at a time through transformers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergebench.errors import RunError
from mergebench.evaluation import Candidate, Record, evaluate_models, load_suite
from mergebench.evaluation.labelled import read_texts
from mergebench.networks.batch import batches, run_batches
from mergebench.networks.network import Network
from tests.evaluation.conftest import LABELS, Files, write_data, write_encoder, write_head


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """One thread for the oracle, which is many tiny calls, and two batches at once for what is tested."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def one_by_one(encoder: Path, head: Path, texts: list[str], pooling: str, normalize: bool, length: int) -> Tensor:
    """[texts, classes]: each text alone, no padding, straight from the files."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    tensors = load_file(head)
    out = []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
            states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
            pooled = states[0] if pooling == "cls" else states.mean(0)
            if normalize:
                pooled = pooled / pooled.norm()
            out.append(tensors["weight"] @ pooled + tensors["bias"])
    return torch.stack(out)


def balance(head: Path, logits: Tensor) -> Tensor:
    """Change the bias so that these logits [texts, classes] become zero in the mean: every label gets its texts."""
    tensors = load_file(head)
    with safe_open(head, "pt") as file:
        metadata = file.metadata()
    save_file({**tensors, "bias": tensors["bias"] - logits.mean(0)}, head, metadata=metadata)
    return logits - logits.mean(0)


def measure(encoder: Path, entry: dict[str, Any]) -> Record:
    torch.set_num_threads(2)
    (record,) = evaluate_models([Candidate("m", "base", Files(encoder))], load_suite({"tasks": [entry]})).records
    torch.set_num_threads(1)
    return record


@pytest.mark.parametrize(
    ("family", "pooling", "normalize"),
    [
        ("bert", "cls", True),
        ("bert", "mean", False),
        ("roberta", "mean", False),
        ("distilbert", "mean", True),
        ("bert with a head", "cls", False),
        ("mixtral", "mean", False),
    ],
)
def test_equals_one_text_at_a_time(
    family: str,
    pooling: str,
    normalize: bool,
    place: Path,
    entry: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = write_encoder(place / "encoder", family)
    head = write_head(place / "a", pooling=pooling, normalize=str(normalize).lower())
    monkeypatch.setattr("mergebench.networks.features.CPU_TOKENS", 90)
    data = rows(place / "data.jsonl")
    texts = [row["text"] for row in data]
    expected = balance(head, one_by_one(encoder, head, texts, pooling, normalize, 24))
    answers = [LABELS[i] for i in expected.argmax(1)]
    assert set(answers) == set(LABELS)

    record = measure(encoder, entry())

    assert [prediction.output for prediction in record.predictions.values()] == answers
    assert list(record.predictions) == [row["id"] for row in data]
    right = [answer == row["label"] for answer, row in zip(answers, data, strict=True)]
    assert [prediction.score for prediction in record.predictions.values()] == right
    assert (record.n, record.metric, record.direction) == (41, "accuracy", "higher")
    share = sum(right) / 41
    assert record.value == pytest.approx(share)
    assert record.stderr == pytest.approx((share * (1 - share) / 41) ** 0.5)


def test_logits_of_a_padded_batch(encoder: Path, place: Path) -> None:
    from mergebench.evaluation.head import read_head

    texts = ["w1", "w2 w3 w4 w5 w6 w7 w8", "w9 " * 30, ""]
    network = Network(Files(encoder), "AutoModel", torch.device("cpu"))
    head = read_head(place / "a/head.safetensors")
    with torch.inference_mode():
        logits = head.logits(head.pooling(*network.encode(network.tokenize(texts, 24))))
    torch.testing.assert_close(logits, one_by_one(encoder, head.file, texts, "mean", False, 24), atol=1e-5, rtol=1e-5)


def test_max_length(encoder: Path, place: Path, entry: Callable[..., dict[str, Any]]) -> None:
    """The suite's goes before the head's, and both end where the model does (40 positions)."""
    write_data(place / "data.jsonl", longest=60)
    texts = [row["text"] for row in rows(place / "data.jsonl")]
    head = place / "a/head.safetensors"
    balance(head, one_by_one(encoder, head, texts, "mean", False, 24))
    seen = set()
    for given_length, effective in ((None, 24), (4, 4), (40, 40)):
        expected = one_by_one(encoder, head, texts, "mean", False, effective).argmax(1)
        record = measure(encoder, entry(max_length=given_length))
        assert [p.output for p in record.predictions.values()] == [LABELS[i] for i in expected]
        seen.add(tuple(expected.tolist()))
    assert len(seen) == 3


@pytest.mark.parametrize("numbers", [False, True], ids=["words", "numbers"])
def test_own_columns_whole_numbers_and_limit(
    encoder: Path, place: Path, entry: Callable[..., dict[str, Any]], numbers: bool
) -> None:
    head = write_head(place / "a", labels=["0", "1", "2"])
    if numbers:
        save_file(load_file(head), head, metadata={"labels": "[0, 1, 2]", "pooling": "mean", "max_length": "24"})
    lines = [{"key": number, "sentence": f"w{number} w3", "class": number % 3} for number in range(9)]
    (place / "data.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    record = measure(encoder, entry(id="key", text="sentence", label="class", limit=5, split="validation"))
    assert list(record.predictions) == ["0", "1", "2", "3", "4"]
    assert (record.n, record.split) == (5, "validation")
    assert all(p.score == (p.output == str(int(i) % 3)) for i, p in record.predictions.items())


def test_tokenized_once_for_all_models(
    encoder: Path, place: Path, entry: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    tokenize = Network.tokenize
    monkeypatch.setattr(Network, "tokenize", lambda *args: calls.append(1) or tokenize(*args))
    other = write_encoder(place / "copy", seed=5)  # other weights, the same tokenizer
    suite = load_suite({"tasks": [entry(), entry(name="b", max_length=20), entry(name="c")]})
    candidates = [Candidate(str(n), "input", Files(path)) for n, path in enumerate([encoder, other, encoder])]
    first = evaluate_models(candidates, suite)
    assert len(calls) == 2  # one for each length
    evaluate_models(candidates, suite)
    assert len(calls) == 2
    tokenizer = (other / "tokenizer.json").read_text()
    assert '"w1": 5' in tokenizer
    swapped = tokenizer.replace('"w1": 5', '"w1": 4').replace('"w0": 4', '"w0": 5')
    (other / "tokenizer.json").write_text(swapped)  # as long as before
    second = evaluate_models(candidates, suite)
    assert len(calls) == 4  # another tokenizer gives other tokens
    assert first.of("0")["a"].predictions == second.of("0")["a"].predictions


def test_bits_do_not_depend_on_threads(encoder: Path, place: Path, entry: Callable[..., dict[str, Any]]) -> None:
    network = Network(Files(encoder), "AutoModel", torch.device("cpu"))
    tokens = network.tokenize([row["text"] for row in rows(place / "data.jsonl")], 24)
    groups = batches([len(one) for one in tokens], 100)

    def work(group: list[int]) -> Tensor:
        assert torch.get_num_threads() == 1
        with torch.inference_mode():
            return network.encode([tokens[i] for i in group])[0]

    outcomes, ticks = [], []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        outcomes.append(run_batches(work, groups, torch.device("cpu"), ticks.append))
        assert torch.get_num_threads() == threads
        with ThreadPoolExecutor(1) as later:  # a thread that begins afterwards, as the engine's do
            assert later.submit(torch.get_num_threads).result() == threads
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))
    assert ticks == 2 * [len(group) for group in groups]


def test_a_failing_batch_ends_the_run_with_its_error() -> None:
    torch.set_num_threads(2)
    done = []

    def work(group: list[int]) -> None:
        done.append(group)
        time.sleep(0.001)
        if group == [1]:
            raise ZeroDivisionError

    groups = [[number] for number in range(1000)]
    with pytest.raises(ZeroDivisionError):
        run_batches(work, groups, torch.device("cpu"), lambda items: None)
    assert torch.get_num_threads() == 2
    assert len(done) < 1000

    def stop(items: int) -> None:
        raise KeyboardInterrupt

    done.clear()
    with pytest.raises(KeyboardInterrupt):
        run_batches(work, [[0], *groups[2:]], torch.device("cpu"), stop)
    assert len(done) < 998


@given(lengths=st.lists(st.integers(0, 50), max_size=80), tokens=st.integers(1, 120))
def test_batches(lengths: list[int], tokens: int) -> None:
    found = batches(lengths, tokens)
    assert sorted(position for group in found for position in group) == list(range(len(lengths)))
    widths = [max(lengths[i] for i in group) for group in found]
    assert all(len(group) == 1 or len(group) * width <= tokens for group, width in zip(found, widths, strict=True))
    assert widths == sorted(widths, reverse=True)
    if tokens >= 50 and lengths:  # never more than twice as many batches as full ones would be
        assert len(found) <= 1 + 2 * sum(lengths) // tokens + sum(1 for _ in set(lengths))


def test_labels_are_words_or_whole_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "a", "label": 3}\n{"id": 2, "text": "b", "label": true}\n')
    assert read_texts(tmp_path / "a.jsonl", "id", "text", "label", 8, limit=1).labels == ["3"]
    with pytest.raises(RunError, match=r"a\.jsonl:2: label must be text, got True"):
        read_texts(tmp_path / "a.jsonl", "id", "text", "label", 8)
