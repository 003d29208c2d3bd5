"""Scorers: what they make of continuations, and how a suite names them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mergebench.errors import MergebenchError, ModelError, RecipeError, RunError
from mergebench.evaluation import load_suite
from mergebench.evaluation.scorer import Continuation, Scorer
from mergebench.evaluation.store import Store
from tests.evaluation.conftest import WORDS, write_encoder
from tests.language import write_prompts

TEXTS = [" w1 w2", "w3 " * 30, "", "w5 w6 w7", "unknown"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "prompts.jsonl")
    return tmp_path


def suite_of(scorer: Any) -> Any:
    return load_suite({"tasks": [{"name": "one", "kind": "generation", "data": "prompts.jsonl", "scorer": scorer}]})


def scorer_of(spec: Any) -> Scorer:
    (task,) = suite_of(spec).tasks
    assert isinstance(task.params.scorer, Scorer)
    return task.params.scorer


def written(texts: list[str], targets: list[str] | None = None) -> list[Continuation]:
    return [Continuation("w9", text, target) for text, target in zip(texts, targets or texts, strict=True)]


def write_classifier(directory: Path, problem: str = "single_label_classification", safe: bool = True) -> Path:
    """A random BERT with a head of three labels, beside a word-level tokenizer."""
    import transformers

    write_encoder(directory)
    config = transformers.BertConfig.from_pretrained(
        directory, id2label={0: "clean", 1: "rude", 2: "odd"}, label2id={"clean": 0, "rude": 1, "odd": 2}
    )
    config.problem_type = problem
    torch.manual_seed(6)
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(directory)
    if not safe:
        (directory / "model.safetensors").unlink()
        torch.save(model.state_dict(), directory / "pytorch_model.bin")
    return directory


def test_exact_match(here: Path) -> None:
    scorer = scorer_of("exact-match")
    items = written([" Paris\n", "Paris!", "paris", ""], ["Paris", "Paris", "Paris", " "])
    assert scorer(items) == [1, 0, 0, 1]
    assert (scorer.metric, scorer.direction, scorer.target) == ("accuracy", "higher", True)


def test_regex(here: Path) -> None:
    scorer = scorer_of({"regex": r"^ ?Par\w+s$"})
    assert scorer(written([" Paris", "Paris", "Pars", "in Paris", "Paris\n"])) == [1, 1, 0, 0, 1]
    assert (scorer.metric, scorer.direction, scorer.target) == ("accuracy", "higher", False)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_classifier(here: Path, problem: str) -> None:
    """In batches as one text at a time, through transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = write_classifier(here / "judge", problem)
    scorer = scorer_of({"classifier": "judge", "label": "rude", "direction": "lower"})
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    several = problem.startswith("multi")
    expected = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, max_length=40, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0]
        expected.append((logits.sigmoid() if several else logits.softmax(-1))[1].item())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 40}))

    assert scorer(written(TEXTS)) == pytest.approx(expected, abs=1e-6)
    assert len({round(value, 4) for value in expected}) == len(TEXTS)
    assert (scorer.metric, scorer.direction) == ("P(rude)", "lower")
    assert {file.name for file in scorer.files} >= {"model.safetensors", "config.json", "tokenizer.json"}


def test_function(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.py").write_text(
        "import numpy\n"
        "def length(texts):\n    return numpy.array([len(text) for text in texts], 'float32')\n"
        "def one(texts):\n    return [1.0]\n"
        "def infinite(texts):\n    return [float('inf')] * len(texts)\n"
        "def failing(texts):\n    raise KeyError('x')\n"
        "word = 'x'\n"
    )
    monkeypatch.syspath_prepend(str(here))
    scorer = scorer_of({"function": "mine:length", "direction": "higher"})
    assert scorer(written(TEXTS)) == [len(text) for text in TEXTS]
    assert (scorer.metric, scorer.direction) == ("length", "higher")
    for name, what in (
        ("one", "5 continuations need as many finite numbers"),
        ("infinite", "5 continuations need as many finite numbers"),
        ("failing", "mine:failing: KeyError: 'x'"),
    ):
        with pytest.raises(RunError, match=what):
            scorer_of({"function": f"mine:{name}", "direction": "lower"})(written(TEXTS))
    with pytest.raises(RecipeError, match="scorer: 'mine:word' is no function"):
        suite_of({"function": "mine:word", "direction": "lower"})
    sys.modules.pop("mine")


def test_a_real_classifier_of_scikit_learn(here: Path) -> None:
    pytest.importorskip("profanity_check")
    scorer = scorer_of({"function": "profanity_check:predict_prob", "direction": "lower"})
    clean, rude = scorer(written(["Good morning, how are you?", "You are a fucking idiot"]))
    assert clean < 0.1
    assert rude > 0.9
    assert "alt-profanity-check" in scorer.versions


@pytest.mark.parametrize(
    ("spec", "kind", "what"),
    [
        ("exact-macth", RecipeError, "tasks.0.scorer: no scorer is called 'exact-macth'"),
        ({"regexp": "a"}, RecipeError, "tasks.0.scorer: names no scorer, got regexp"),
        (3, RecipeError, "tasks.0.scorer: names no scorer, got 3"),
        ({"regex": "("}, RecipeError, r"tasks.0.scorer: '\(' is no regular expression"),
        ({"regex": 3}, RecipeError, "tasks.0.scorer.regex: must be a word, got 3"),
        ({"regex": "a", "flags": "i"}, RecipeError, "tasks.0.scorer.flags: 'regex' has no such key"),
        ("regex", RecipeError, "tasks.0.scorer.regex: missing, 'regex' needs it"),
        ({"function": "no_such_module:f", "direction": "lower"}, RecipeError, "'no_such_module:f' cannot be"),
        ({"function": "..:x", "direction": "lower"}, RecipeError, "'..:x' cannot be imported"),
        ({"function": "json", "direction": "lower"}, RecipeError, "tasks.0.scorer: 'json' cannot be imported"),
        ({"function": "json:dumps"}, RecipeError, "tasks.0.scorer.direction: missing, 'function' needs it"),
        ({"classifier": "gone", "label": "a", "direction": "lower"}, RecipeError, "classifier: no such folder: gone"),
        ({"classifier": "judge", "label": "rud", "direction": "lower"}, RecipeError, "judge: it has no label 'rud'"),
        ({"classifier": ".", "label": "a", "direction": "lower"}, ModelError, "not a classifier"),
    ],
)  # fmt: skip
def test_wrong_scorers(here: Path, spec: Any, kind: type[MergebenchError], what: str) -> None:
    if isinstance(spec, dict) and spec.get("classifier") == "judge":
        write_classifier(here / "judge")
    with pytest.raises(kind, match=what):
        suite_of(spec)


def test_never_reads_a_pickle(here: Path) -> None:
    write_classifier(here / "judge", safe=False)
    scorer = scorer_of({"classifier": "judge", "label": "rude", "direction": "lower"})
    with pytest.raises(ModelError, match=r"judge: not a classifier: .*safetensors"):
        scorer(written(WORDS[:2]))


def test_results_of_another_scorer_are_others(here: Path) -> None:
    def key(spec: Any) -> str | None:
        (task,) = suite_of(spec).tasks
        return Store(here / "results").key("model", task, "cpu", {})

    assert key({"regex": "a"}) == key({"regex": "a"})
    assert len({key({"regex": "a"}), key({"regex": "b"}), key("exact-match")}) == 3
    write_classifier(here / "judge")
    judge = {"classifier": "judge", "label": "rude", "direction": "lower"}
    before = key(judge)
    assert before == key(judge) != key(judge | {"label": "odd"})
    (here / "judge" / "config.json").write_text((here / "judge" / "config.json").read_text() + "\n")
    assert key(judge) != before
