"""Results: golden standard errors, views, and the document on disk."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergebench.errors import RunError
from mergebench.evaluation import Record, Results, document_of, markdown, mean_relatives, mean_values, save
from mergebench.evaluation.results import with_relatives
from mergebench.evaluation.task import Prediction, accuracy


def record(model: str = "m", task: str = "a", value: float = 0.5, **more: Any) -> Record:
    whole = {
        "role": "input", "split": "test", "metric": "accuracy", "direction": "higher", "stderr": 0.05, "n": 100,
        "relative": None, "seconds": 1.5, "predictions": {"1": Prediction("good", 1.0)},
    }  # fmt: skip
    return Record(model=model, task=task, value=value, **{**whole, **more})


def test_golden_standard_errors() -> None:
    """sqrt(p (1 - p) / n), to ten digits."""
    for right, n, value, stderr in [
        (3, 4, 0.75, 0.2165063509),
        (270, 300, 0.9, 0.0173205081),
        (1, 3, 0.3333333333, 0.2721655270),
        (5, 5, 1.0, 0.0),
        (0, 5, 0.0, 0.0),
    ]:
        score = accuracy({str(i): Prediction("x", float(i < right)) for i in range(n)})
        assert (round(score.value, 10), round(score.stderr or 0, 10), score.n) == (value, stderr, n)


def test_relatives() -> None:
    records = [record("x", "a", 0.8), record("y", "a", 0.6), record("x", "b", 0.0), record("y", "b", 0.5)]
    found = with_relatives(records, {"a": "x", "b": "x"})
    assert [one.relative for one in found] == [1.0, pytest.approx(0.75), None, None]  # nothing relates to zero
    assert [one.relative for one in with_relatives(records, {"b": "y"})] == [None, None, 0.0, 1.0]
    assert [replace(one, relative=None) for one in found] == records


def test_means_are_views() -> None:
    whole = Results(
        {}, (record("x", "a", 0.8, relative=1.0), record("x", "b", 0.4, relative=0.5), record("y", "a", 0.6))
    )
    assert mean_values(whole) == {"x": pytest.approx(0.6), "y": None}  # y was not measured on b
    assert mean_relatives(whole) == {"x": 0.75, "y": None}
    assert "mean" not in json.dumps(document_of(whole))
    mixed = Results({}, (record("x", "a", 0.8), record("x", "b", 20.0, metric="perplexity", direction="lower")))
    assert mean_values(mixed) == {"x": None}
    assert mean_relatives(mixed) == {"x": None}


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
numbers = st.floats(0, 1)
predictions = st.dictionaries(words, st.builds(Prediction, words, numbers), max_size=3)
records = st.builds(
    record,
    words,
    words,
    numbers,
    role=st.sampled_from(["base", "input", "merged", "baseline"]),
    direction=st.sampled_from(["higher", "lower"]),
    metric=words,
    stderr=numbers | st.none(),
    relative=numbers | st.none(),
    predictions=predictions,
)


@given(st.lists(records, max_size=4), st.dictionaries(words, words | st.integers() | st.none(), max_size=3))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, found: list[Record], made: dict[str, Any]) -> None:
    place = tmp_path_factory.getbasetemp()
    results = Results(made, tuple(found))
    save(results, place)
    assert Results.load(place) == results == Results.load(place / "evaluation.json")
    assert json.loads((place / "evaluation.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps(document_of(results))
    )
    assert (place / "evaluation.md").read_text(encoding="utf-8") == markdown(results)


def test_the_document_as_other_tools_read_it(tmp_path: Path) -> None:
    """The names are part of the interface."""
    save(Results({"torch": "2"}, (record("x"), record("y"))), tmp_path)
    text = (tmp_path / "evaluation.json").read_text(encoding="utf-8")
    document = json.loads(text)
    assert document["made"] == {"torch": "2"}
    assert document["records"][1] == {
        "model": "y", "role": "input", "task": "a", "split": "test", "metric": "accuracy", "direction": "higher",
        "value": 0.5, "stderr": 0.05, "n": 100, "relative": None, "seconds": 1.5, "predictions": {"1": ["good", 1.0]},
    }  # fmt: skip
    assert sum(line.startswith('{"model"') for line in text.splitlines()) == 2  # one record a line


def test_json_has_no_word_for_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        save(Results({}, (record(value=float("nan")),)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_keys_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    document = document_of(Results({}, (record(),)))
    document["records"][0] = {**document["records"][0], "flips": 3}
    (tmp_path / "evaluation.json").write_text(json.dumps(document))
    assert Results.load(tmp_path).records == (record(),)


def test_put_in_place_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = os.umask(0o027)
    try:
        save(Results({}, (record("x"),)), tmp_path)
    finally:
        os.umask(mask)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "evaluation.md"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError):
        save(Results({}, (record("y"),)), tmp_path)
    assert Results.load(tmp_path).models == ["x"]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", '{"made": {}}', '{"made": 1, "records": []}', '{"made": {}, "records": [1]}',
        '{"made": {}, "records": [{"model": "x"}]}',
        json.dumps({"made": {}, "records": [{**vars(record()), "role": "boss"}]}),
        json.dumps({"made": {}, "records": [{**vars(record()), "model": {"a": 1}}]}), "[" * 100_000,
        json.dumps({"made": {}, "records": [{**vars(record()), "value": None}]}),
        json.dumps({"made": {}, "records": [{**vars(record()), "predictions": {"1": "good"}}]}),
    ],
)  # fmt: skip
def test_what_is_no_evaluation(text: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(RunError, match=r"evaluation.json: not an evaluation"):
        Results.load(tmp_path)


def test_no_evaluation_at_all(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"evaluation.json: cannot be read: No such file"):
        Results.load(tmp_path)
