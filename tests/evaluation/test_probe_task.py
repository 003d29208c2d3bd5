"""Probe tasks: equal to the probe's own formula on the states that transformers returns, one text at a time."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergebench.editing.probes.probe import Probe
from mergebench.errors import MergebenchError, ModelError, RecipeError, RunError
from mergebench.evaluation import Candidate, Record, evaluate_models, load_suite
from tests.evaluation.conftest import Files
from tests.language import some_text, write_decoder, write_rows

FITTED = {"layer": 1, "norm": "post", "pool": "last", "max_length": 30}


@pytest.fixture(autouse=True)
def quick(one_thread: None) -> None:
    """Tiny matrices."""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama; read only."""
    return write_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with texts of two classes, 13 of them desired, and two probes: one says how it reads."""
    monkeypatch.chdir(tmp_path)
    source = random.Random(0)
    rows = [{"id": f"t{n}", "text": f"{n} {some_text(source, 20)}", "label": int(n % 3 == 0)} for n in range(20)]
    write_rows(tmp_path / "data.jsonl", rows)
    probe_of({}).save(tmp_path / "bare.safetensors")
    probe_of(FITTED).save(tmp_path / "fitted.safetensors")
    return tmp_path


def probe_of(about: dict[str, Any], width: int = 16) -> Probe:
    torch.manual_seed(0)
    return Probe(torch.randn(2, width) / 20, torch.tensor([0.5, -0.25]), about=about)


def measure(decoder: Path, **more: Any) -> Record:
    entry = {"name": "p", "kind": "probe", "data": "data.jsonl", "probe": "fitted.safetensors", **more}
    (record,) = evaluate_models([Candidate("m", "base", Files(decoder))], load_suite({"tasks": [entry]})).records
    return record


def expected(decoder: Path, layer: int, pool: str, max_length: int) -> dict[str, Tensor]:
    """The probe's two logits of every text, in transformers' own states."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    probe = probe_of({})
    found = {}
    for line in Path("data.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids = tokenizer(row["text"], truncation=True, max_length=max_length, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            (states,) = module(ids, output_hidden_states=True).hidden_states[layer]
        features = states.mean(0) if pool == "mean" else states[-1]
        found[row["id"]] = probe.weight @ features + probe.bias
    return found


def labels() -> dict[str, int]:
    rows = (json.loads(line) for line in Path("data.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["id"]: row["label"] for row in rows}


@pytest.mark.parametrize("of", ["both", "desired", "undesired"])
@pytest.mark.parametrize("metric", ["loss", "accuracy", "score"])
def test_what_is_measured(here: Path, decoder: Path, of: str, metric: str) -> None:
    record = measure(decoder, of=of, metric=metric)
    values = {}
    for item, logits in expected(decoder, 1, "last", 30).items():
        label = labels()[item]
        loss = torch.nn.functional.cross_entropy(logits[None], torch.tensor([label])).item()
        right = float(int(logits.argmax()) == label)
        score = (logits[1] - logits[0]).item()
        if of == "both" or of == ("desired", "undesired")[label]:
            values[item] = {"loss": loss, "accuracy": right, "score": score}[metric]
    assert {item: p.score for item, p in record.predictions.items()} == pytest.approx(values, rel=1e-5, abs=1e-4)
    assert record.value == pytest.approx(sum(values.values()) / len(values), rel=1e-5, abs=1e-4)
    assert record.n == {"both": 20, "desired": 13, "undesired": 7}[of]
    assert record.metric == metric
    better = "higher" if metric == "accuracy" or (metric, of) == ("loss", "undesired") else "lower"
    assert record.direction == better


def test_how_a_probe_reads_is_its_own_or_the_tasks(here: Path, decoder: Path) -> None:
    def scores(**more: Any) -> dict[str, float]:
        return {item: p.score for item, p in measure(decoder, metric="score", **more).predictions.items()}

    def by_itself(layer: int, pool: str, max_length: int) -> Any:
        logits = expected(decoder, layer, pool, max_length).items()
        return pytest.approx({item: (two[1] - two[0]).item() for item, two in logits}, rel=1e-5, abs=1e-4)

    bare = "bare.safetensors"
    assert scores(probe=bare) == by_itself(2, "mean", 100)
    assert scores(probe=bare, layer=1, pool="last", max_length=30) == scores() == by_itself(1, "last", 30)
    assert scores(probe=bare, norm="pre") != scores(probe=bare, norm="post")
    with pytest.raises(RecipeError, match=r"layer: 2: fitted\.safetensors was fitted with 1"):
        measure(decoder, layer=2)


def test_limit_counts_what_is_measured(here: Path, decoder: Path) -> None:
    first = measure(decoder, of="undesired", limit=3)
    assert list(first.predictions) == ["t0", "t3", "t6"]
    drawn = measure(decoder, of="undesired", limit=3, seed=1)
    assert len(drawn.predictions) == 3
    assert {labels()[item] for item in drawn.predictions} == {1}


def test_which_class_is_undesired(here: Path, decoder: Path) -> None:
    rows = [{"id": 1, "text": "cat", "label": "rude"}, {"id": 2, "text": "dog", "label": "kind"}]
    write_rows(here / "words.jsonl", rows)
    with pytest.raises(RecipeError, match=r"its labels are kind, rude: which is undesired\?"):
        measure(decoder, data="words.jsonl")
    with pytest.raises(RecipeError, match="no label is 'rud'") as caught:
        measure(decoder, data="words.jsonl", undesired="rud")
    assert caught.value.hint == "did you mean 'rude'?"
    rude, kind = (measure(decoder, data="words.jsonl", undesired=one, of="undesired") for one in ("rude", "kind"))
    assert (list(rude.predictions), list(kind.predictions)) == (["1"], ["2"])
    write_rows(here / "words.jsonl", [row | {"label": label} for row, label in zip(rows, (True, False), strict=True)])
    assert measure(decoder, data="words.jsonl", of="undesired").value == rude.value
    write_rows(here / "words.jsonl", [row | {"label": 0} for row in rows])
    assert measure(decoder, data="words.jsonl").n == 2
    with pytest.raises(RecipeError, match="no item is undesired"):
        measure(decoder, data="words.jsonl", of="undesired")


def test_what_does_not_fit(here: Path, decoder: Path) -> None:
    def refused(what: str, kind: type[MergebenchError], **more: Any) -> None:
        with pytest.raises(kind, match=what):
            measure(decoder, **more)

    probe_of(FITTED, width=12).save(here / "narrow.safetensors")
    refused(r"narrow.safetensors: the probe reads 12 features, tiny has 16", ModelError, probe="narrow.safetensors")
    refused("layer 9: the model has 2 blocks", RecipeError, probe="bare.safetensors", layer=9)
    refused("not a probe", ModelError, probe=str(decoder / "model.safetensors"))
    refused("must be one of post, pre", RecipeError, norm="mid")
    write_rows(here / "blank.jsonl", [{"id": 1, "text": "", "label": 1}])
    refused("text must be text", RunError, data="blank.jsonl")
    write_rows(here / "odd.jsonl", [{"id": 1, "text": "cat", "label": 0.5}])
    refused("label must be a word", RunError, data="odd.jsonl")


def test_texts_are_read_once_for_probes_that_read_alike(
    here: Path, decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergebench.evaluation.tasks import probe as module

    read, features = [], module.features
    monkeypatch.setattr(module, "features", lambda *args: read.append(args[2]) or features(*args))
    keys = {"kind": "probe", "data": "data.jsonl", "probe": "fitted.safetensors"}
    tasks = [{"name": metric, "metric": metric, **keys} for metric in ("loss", "score")]
    tasks.append(keys | {"name": "other", "probe": "bare.safetensors", "max_length": 30})
    evaluate_models([Candidate("m", "base", Files(decoder))], load_suite({"tasks": tasks}))
    assert [one.layer for one in read] == [1, -1]
