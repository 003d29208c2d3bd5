"""Which differences are shown: against the baseline and the best other, each task apart that has other scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergebench.evaluation import Record, Results, report, save
from mergebench.evaluation.compare.comparison import against
from mergebench.evaluation.compare.inference import holm
from mergebench.evaluation.compare.rivals import families, rivals
from mergebench.evaluation.task import Prediction

LOWER: Any = {"metric": "bits_per_byte", "direction": "lower"}


def record(model: str, role: Any, scores: list[float], task: str = "t", **more: Any) -> Record:
    answers = {f"{task}-{i}": Prediction("", score) for i, score in enumerate(scores)}
    whole: dict[str, Any] = {"metric": "accuracy", "direction": "higher", **more}
    return Record(
        model=model, role=role, task=task, split="test", value=sum(scores) / len(scores), stderr=None, n=len(scores),
        relative=None, seconds=1.0, predictions=answers, **whole,
    )  # fmt: skip


def right(model: str, role: Any, count: int) -> Record:
    return record(model, role, [float(i < count) for i in range(40)])


def pairs(*records: Record, **made: Any) -> list[tuple[str, str]]:
    results = Results(made, records)
    return [(one.new, one.old) for one in rivals(results, against(results))]


BASE, A, B = right("base", "base", 10), right("a", "input", 20), right("b", "input", 22)
LINEAR, TIES, PCB = right("linear", "baseline", 25), right("ties", "baseline", 30), right("pcb", "merged", 28)


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ((BASE, A, B, LINEAR, TIES, PCB), [("pcb", "ties")]),  # a merge: its best baseline
        ((BASE, A, B, PCB), [("pcb", "b")]),  # or without any its best input
        ((BASE, A, B), [("b", "a")]),  # nothing merged: the best other
        ((BASE, A), []),  # nothing but what is against the base
        ((A, B, TIES), [("ties", "b")]),
        ((BASE, right("m1", "merged", 25), right("m2", "merged", 30), right("m3", "merged", 20)),
         [("m2", "m1"), ("m3", "m2")]),
        ((BASE,), []),
        ((), []),
    ],
)  # fmt: skip
def test_the_best_other(records: tuple[Record, ...], expected: list[tuple[str, str]]) -> None:
    assert pairs(*records) == expected


def test_a_chosen_baseline_is_the_only_one() -> None:
    assert pairs(BASE, A, B, LINEAR, PCB, baseline="linear") == []
    edited = [BASE, right("pcb unedited", "baseline", 39), LINEAR, PCB]  # not a way to merge: no rival
    assert pairs(*edited, baseline="pcb unedited", unedited={"pcb unedited": []}) == [("pcb", "linear")]


def test_where_lower_is_better_the_best_is_the_lowest() -> None:
    one, two, three = (record(m, "baseline", [s, s + 1], **LOWER) for m, s in (("x", 3.0), ("y", 1.0), ("z", 2.0)))
    merged = record("m", "merged", [1.5, 2.6], **LOWER)
    assert pairs(record("base", "base", [4.0, 4.0], **LOWER), one, two, three, merged) == [("m", "y")]


def test_who_failed_on_some_items_is_no_rival() -> None:
    more = [record(m, r, [1.0, 0.0], "u") for m, r in (("base", "base"), ("linear", "baseline"), ("pcb", "merged"))]
    assert pairs(BASE, LINEAR, TIES, PCB, *more) == [("pcb", "linear")]


def test_p_of_several_are_adjusted(tmp_path: Path) -> None:
    results = Results({}, (BASE, A, B, TIES, PCB))
    family = families(results)[0]
    assert [row.new for row in family.rows] == ["a", "b", "ties", "pcb"]
    assert family.holm == holm([row.flips.p for row in family.rows])
    assert " Holm " in report(results) and " Holm " not in report(Results({}, (BASE, PCB)))
    save(results, tmp_path)
    document = json.loads((tmp_path / "evaluation.json").read_text())["comparisons"]
    assert [one["p_holm"] for one in document] == [*family.holm, families(results)[1].rows[0].flips.p]
    assert (document[-1]["old"], document[-1]["new"]) == ("ties", "pcb")


def test_a_ruined_perplexity_is_seen() -> None:
    """Beside accuracies that did not change, it has a table of its own."""
    bits = {"base": [1.0, 1.2, 0.9, 1.1], "ruined": [6.0, 6.3, 5.8, 6.1]}
    same = [record(m, r, [1.0, 0.0] * 10) for m, r in (("base", "base"), ("ruined", "merged"))]
    news = [record(m, r, bits[m], "news", **LOWER) for m, r in (("base", "base"), ("ruined", "merged"))]
    results = Results({}, (same[0], news[0], same[1], news[1]))
    first, second = families(results)
    assert (first.task, first.rows[0].flips.difference) == ("", 0.0)
    assert (second.task, second.rows[0].flips.difference) == ("news", pytest.approx(-5.0))
    text = report(results)
    assert "against base: news, bits per byte" in text and "−5 [−5" in text and "4 (100.0%)" in text


def test_other_scores_alone_have_tables_too() -> None:
    f1 = [record(m, r, [0.5, 0.25, s], "f", metric="f1") for m, r, s in (("base", "base", 1.0), ("m", "merged", 0.5))]
    news = [record(m, r, [2.0, s], "news", **LOWER) for m, r, s in (("base", "base", 2.0), ("m", "merged", 1.0))]
    found = families(Results({}, (f1[0], news[0], f1[1], news[1])))
    assert [one.task for one in found] == ["f", "news"]
