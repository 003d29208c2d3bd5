"""Probes on frozen features equal scikit-learn, or counting neighbours, on features made one item at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn.linear_model import LogisticRegression

from mergebench import plugins
from mergebench.errors import MergebenchError, RunError
from mergebench.evaluation import Candidate, Record, evaluate_models, load_suite
from mergebench.networks.features import Texts
from tests.evaluation.conftest import Files, write_data, write_encoder
from tests.evaluation.test_images import pooled_by_hand, write_image_encoder, write_images

pytestmark = pytest.mark.usefixtures("one_thread")

Row = dict[str, str]


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def text_features(encoder: Path, texts: list[str], how: str, normalize: bool, length: int) -> np.ndarray:
    """[texts, width]: each text alone, no padding."""
    model = transformers.AutoModel.from_pretrained(encoder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    out = []
    for text in texts:
        with torch.no_grad():
            ids = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
            states = model(input_ids=ids).last_hidden_state[0]
        parts = {"cls": states[0], "mean": states.mean(0)}
        row = torch.cat([parts[part] for part in how.split("+")])
        out.append(row / row.norm() if normalize else row)
    return torch.stack(out).double().numpy()


def nearest(known: np.ndarray, labels: list[str], asked: np.ndarray, k: int) -> list[str]:
    answers = []
    for one in asked:
        close = np.argsort(np.linalg.norm(known - one, axis=1))[:k]
        votes = Counter(labels[i] for i in close)
        answers.append(min(votes, key=lambda label: (-votes[label], label)))
    return answers


def linear(known: np.ndarray, labels: list[str], asked: np.ndarray) -> list[str]:
    mean, std = known.mean(0), known.std(0)
    model = LogisticRegression(C=0.01, tol=1e-8, max_iter=5000).fit((known - mean) / std, labels)
    return list(model.predict((asked - mean) / std))


@pytest.fixture
def task(place: Path) -> Callable[..., dict[str, Any]]:
    """A task on 41 texts, learnt from 60 others."""
    write_data(place / "train.jsonl", 60, seed=7)

    def make(**changes: Any) -> dict[str, Any]:
        return {"name": "e", "kind": "embedding", "data": "data.jsonl", "train": "train.jsonl", **changes}

    return make


Make = Callable[..., dict[str, Any]]


def measure(encoder: Path, *tasks: dict[str, Any]) -> tuple[Record, ...]:
    return evaluate_models([Candidate("m", "base", Files(encoder))], load_suite({"tasks": list(tasks)})).records


@pytest.mark.parametrize(
    ("probe", "k", "how", "normalize", "length"),
    [
        ("knn", None, "mean", False, 24),
        ("knn", 4, "cls+mean", True, 24),
        ("knn", 1, "cls", True, 4),
        ("linear", None, "mean", False, 24),
        ("linear", None, "cls+mean", True, 40),
    ],
)
def test_equals_probes_made_apart(
    probe: str, k: int | None, how: str, normalize: bool, length: int,
    encoder: Path, place: Path, task: Make, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("mergebench.networks.features.CPU_TOKENS", 90)
    train, data = rows(place / "train.jsonl"), rows(place / "data.jsonl")
    known, asked = (
        text_features(encoder, [row["text"] for row in part], how, normalize, length) for part in (train, data)
    )
    labels = [row["label"] for row in train]
    expected = nearest(known, labels, asked, k or 5) if probe == "knn" else linear(known, labels, asked)
    assert len(set(expected)) > 1

    (record,) = measure(encoder, task(probe=probe, k=k, pooling=how, normalize=normalize, max_length=length))

    assert [prediction.output for prediction in record.predictions.values()] == expected
    right = [answer == row["label"] for answer, row in zip(expected, data, strict=True)]
    assert [prediction.score for prediction in record.predictions.values()] == right
    assert (record.n, record.metric, record.value) == (41, "accuracy", sum(right) / 41)


def test_images(place: Path, task: Make) -> None:
    encoder = write_image_encoder(place / "encoder")
    train, data = write_images(place / "images/train.jsonl", 40), write_images(place / "images/data.jsonl", 20, seed=1)
    known, asked = (pooled_by_hand(encoder, part, "cls+mean", False, 1).double().numpy() for part in (train, data))
    labels = [row["label"] for row in rows(train)]
    common = {"data": "images/data.jsonl", "train": "images/train.jsonl", "image": "image", "pooling": "cls+mean"}
    by_line, by_vote = measure(encoder, task(**common), task(name="k", probe="knn", **common))
    assert [p.output for p in by_line.predictions.values()] == linear(known, labels, asked)
    assert [p.output for p in by_vote.predictions.values()] == nearest(known, labels, asked, 5)


def test_features_are_made_once_for_a_model(
    encoder: Path, place: Path, task: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    lengths = Texts.lengths
    monkeypatch.setattr(Texts, "lengths", lambda self, *args: made.append(len(self)) or lengths(self, *args))
    write_data(place / "more.jsonl", 41, seed=9)
    tasks = [task(), task(name="k", probe="knn"), task(name="c", pooling="cls"), task(name="m", data="more.jsonl")]
    tasks += [task(name="n", probe="knn", normalize=True)]
    other = write_encoder(place / "other", seed=5)
    suite, steps = load_suite({"tasks": tasks}), []
    one, two = Candidate("one", "input", Files(encoder)), Candidate("two", "input", Files(other))
    both = evaluate_models([one, two], suite, progress=steps.append)
    assert made == 2 * [60, 41, 60, 41, 41]  # kNN's are there, scaled or not; other pooling and other items are not
    assert steps[-1].done == steps[-1].total == 2 * 5 * 41
    alone = evaluate_models([two], load_suite({"tasks": tasks}))
    assert [both.of("two")[t].predictions for t in both.tasks] == [alone.of("two")[t].predictions for t in alone.tasks]
    assert both.of("one")["e"].predictions != both.of("two")["e"].predictions


def said(task: dict[str, Any]) -> tuple[type[MergebenchError], str, str]:
    with pytest.raises(MergebenchError) as caught:
        load_suite({"tasks": [task]})
    return type(caught.value), caught.value.message, caught.value.hint or ""


def test_what_cannot_be_learnt_from(place: Path, task: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    train = place / "train.jsonl"
    assert said(task(probe="knn", k=61)) == (
        RunError, "train.jsonl: 60 items, k: 61 needs as many neighbours", "give a smaller k"
    )  # fmt: skip
    load_suite({"tasks": [task(probe="knn", k=60)]})
    assert said(task(k=5))[1:] == ("k: 5: a linear probe has no neighbours", "add probe: knn, or leave k out")
    assert "tasks.0.probe: must be one of linear, knn" in said(task(probe="forest"))[1]

    whole = train.read_text()
    train.write_text("".join(line + "\n" for line in whole.splitlines() if "none" not in line))
    assert "label 'none' is none of the labels of train.jsonl" in said(task())[1]
    lines = [json.dumps({"id": f"{name}", "text": f"w{name}", "label": "good"}) + "\n" for name in range(8)]
    train.write_text("".join(lines))
    (place / "data.jsonl").write_text(lines[0].replace('"0"', '"other"'))
    assert said(task())[1:] == ("train.jsonl: all items have the label 'good'", "a probe tells labels apart")
    train.write_text("".join(lines) + '{"id": "8", "text": "w", "label": "bad"}\n')
    (place / "data.jsonl").write_text('{"id": "x", "text": "x", "label": "bad"}\n' + lines[5])
    assert said(task())[:2] == (RunError, "data.jsonl:2: the same item is in train.jsonl:6")

    def absent(library: str) -> str:
        raise plugins.PackageNotFoundError

    monkeypatch.setattr(plugins, "version", absent)
    assert said(task())[1:] == (
        "embedding tasks need scikit-learn, which is not installed",
        f"pip install -e '{Path(plugins.__file__).parents[1]}[probe]'",
    )
