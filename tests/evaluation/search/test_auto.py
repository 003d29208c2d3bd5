"""`mergebench auto`: what is chosen, written and said, on a small encoder with two fine-tunes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_model

import mergebench
from mergebench.evaluation import Record, Results
from mergebench.evaluation.compare.rivals import families
from mergebench.evaluation.search import auto, auto_edit
from mergebench.evaluation.search.auto import METHODS
from mergebench.evaluation.search.verdict import verdict
from mergebench.evaluation.task import Prediction
from tests.conftest import Cli
from tests.evaluation.search.conftest import write_suite
from tests.language import some_text, write_decoder, write_rows

MODELS = ("auto", "base", "one", "two", "--suite", "suite.yaml")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer candidates, each with its method's own parameters among them."""
    kept = {"linear": ({}, ""), "task_arithmetic": ({"lambda": 0.5}, "lambda=0.5/1")}
    monkeypatch.setattr(auto, "METHODS", kept)
    monkeypatch.setattr(auto_edit, "EDITS", {"ablate": ({"strength": 0.0}, "strength=0.5/1")})


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "search.json").read_text())
    for point in found["points"]:
        del point["seconds"]
    return found


def test_every_method_has_its_own_values_among_those_tried() -> None:
    for name, (own, over) in METHODS.items():
        tried = dict(word.split("=") for word in over.split(",") if word)
        assert tried.keys() == own.keys(), name
        for key, value in own.items():
            assert value in [float(one) for one in tried[key].split("/")], name


def test_from_end_to_end(place: Path, cli: Cli, few: None) -> None:
    ran = cli(*MODELS, "--json")
    assert (ran.code, ran.err) == (0, "")
    said, found = json.loads(ran.out), document(place / "auto")
    assert [point["values"] for point in found["points"]] == [
        {"method": "linear"},
        {"method": "task_arithmetic", "lambda": 0.5},
        {"method": "task_arithmetic", "lambda": 1.0},
    ]
    chosen = found["points"][said["chosen"]]["values"]
    recipe = mergebench.load("auto/best.yaml")
    assert recipe.merge_method == chosen["method"] and recipe.parameters.get("lambda") == chosen.get("lambda")
    assert cli("merge", "auto/best.yaml", "--out", "again", "--no-eval").code == 0
    written, again = read_model(place / "auto/model"), read_model(place / "again")
    assert all(torch.equal(written[name], again[name]) for name in again)
    results = Results.load("auto")
    made = next(record for record in results.records if record.role == "merged")
    ran = cli("eval", "suite.yaml", "auto/model", "--json")
    assert {r["task"]: r["value"] for r in json.loads(ran.out)["records"]} == {
        task: record.value for task, record in results.of(made.model).items()
    }
    assert {"README.md", "report.html", "evaluation.json"} <= {file.name for file in Path("auto/model").iterdir()}
    assert (said["verdict"].startswith(f"{made.model}: ") and said["verdict"].endswith("3 candidates tried.")) or (
        "3 candidates tried; simpler than" in said["verdict"]
    )
    (family,) = families(results)
    assert family.kind == "chosen" and {row.new for row in family.rows} == {made.model}
    assert {row.old for row in family.rows} == set(results.models) - {made.model}


def test_an_interrupted_run_goes_on_to_the_same(place: Path, few: None, cli: Cli) -> None:
    class Enough(Exception):
        pass

    def stop(point: Any, history: Any) -> None:
        if point.number == 1:
            raise Enough

    mergebench.auto("base", ["one", "two"], "suite.yaml", out="whole")
    with pytest.raises(Enough):
        mergebench.auto("base", ["one", "two"], "suite.yaml", out="parts", searched=stop)
    ran = cli(*MODELS, "--out", "parts", "--resume")
    assert ran.code == 0 and "2 of 3 candidates were measured before" in ran.err
    assert document(place / "parts") == document(place / "whole")
    again = cli(*MODELS, "--out", "parts")
    assert again.code == 2 and "it holds a search" in again.err and "--overwrite" in again.err


def records(name: str, right: int, of: int = 100, role: str = "input") -> Record:
    answers = {f"i{n}": Prediction("", float(n < right)) for n in range(of)}
    return Record(name, role, "t", "test", "accuracy", "higher", right / of, 0.01, of, None, 0.0, answers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (
            80,
            "ties: 80.0% against 60.0% of the best input, a, +20.0 [+13.3, +28.9], p <0.001; against the plain average",
        ),
        (62, "p 0.157: they cannot be told apart, so prefer a, which needs no merge; against"),
        (40, "no merge tried is as good as a, keep that; against"),
    ],
)
def test_it_says_how_sure_it_is(own: int, says: str) -> None:
    rows = (records("a", 60), records("linear", 50, role="baseline"), records("ties", own, role="merged"))
    said = verdict("ties", "a", Results({}, rows), tried=12, why="", average="linear")
    assert says in said and said.endswith("; 12 candidates tried."), said


def test_without_test_items_it_says_so() -> None:
    said = verdict("ties", "", None, tried=1, why="", average="linear")
    assert said == "ties, chosen on validation; the suite has no test items to say what it is worth; 1 candidate tried."


@pytest.mark.parametrize(
    ("words", "code", "says", "hint"),
    [
        (("auto", "base", "one", "--suite", "suite.yaml"), 2, "auto merges two models or more, got 1", "auto BASE A B"),
        (("auto", "base", "one", "two"), 2, "--suite: missing", "validation tasks"),
        (
            ("auto", "base", "one", "gone", "--suite", "suite.yaml"),
            3,
            "error: model 'gone': no such file",
            "did you mean",
        ),
        (("auto", "base", "one", "two", "--edit", "texts.jsonl"), 2, "auto --edit edits one model, got 3", "MODEL"),
        (("auto", "base", "--edit", "texts.jsonl"), 2, "all texts are of one class, '1'", "two classes"),
        (("auto", "base", "--edit", "few.jsonl"), 2, "3 texts of class '0'", "at least 20 of each class"),
    ],
)
def test_mistakes(words: tuple[str, ...], code: int, says: str, hint: str, place: Path, cli: Cli) -> None:
    write_rows(place / "texts.jsonl", [{"text": f"t{n}", "label": 1} for n in range(30)])
    write_rows(place / "few.jsonl", [{"text": f"t{n}", "label": int(n > 2)} for n in range(30)])
    ran = cli(*words)
    assert ran.code == code and ran.out == ""
    error, hinted = ran.err.strip().splitlines()[-2:]
    assert says in error and hint in hinted, ran.err
    assert not Path("auto").exists()


def test_a_suite_without_validation(place: Path, cli: Cli) -> None:
    write_suite(place, "test")
    ran = cli(*MODELS)
    assert ran.code == 2 and "no task has split: validation" in ran.err and "hint:" in ran.err


def test_models_that_do_not_fit(place: Path, cli: Cli) -> None:
    write_decoder(place / "other")
    ran = cli("auto", "base", "one", "other", "--suite", "suite.yaml")
    assert ran.code == 3 and "other" in ran.err and "hint:" in ran.err and not Path("auto").exists()


@pytest.mark.slow
def test_an_edit_from_end_to_end(tmp_path: Path, few: None, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen checkpoint is what its recipe makes; its parts of the texts are disjoint; the front is written."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    write_decoder(tmp_path / "base")
    source = random.Random(0)
    words = ("é fish under", "says the dog")
    rows = [{"text": f"{n} {words[n % 2]} {some_text(source, 6)}", "label": n % 2} for n in range(60)]
    write_rows(tmp_path / "texts.jsonl", rows)
    ran = cli("auto", "--edit", "texts.jsonl", "base", "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert [point["values"]["strength"] for point in said["points"]] == [0.0, 0.5, 1.0]
    assert said["points"][0]["tasks"]["damage"] == pytest.approx(0, abs=1e-9) and 0 in said["front"]
    parts = [(tmp_path / f"auto/data/{name}.jsonl").read_text().splitlines() for name in auto_edit.SHARES]
    assert sorted(map(len, parts)) == [12, 12, 36] and len({line for part in parts for line in part}) == 60
    assert cli("merge", "auto/best.yaml", "--out", "again").code == 0
    written, again = read_model(tmp_path / "auto/model"), read_model(tmp_path / "again")
    assert all(torch.equal(written[name], again[name]) for name in again)
    assert all((tmp_path / f"auto/point-{number}.yaml").is_file() for number in said["front"])
    assert said["verdict"].endswith("3 candidates tried.")
