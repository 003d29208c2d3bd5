"""Comparisons: files and rows give the flips of their answers, pooled they add up; views say so; bad input is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mergebench
from mergebench.errors import MergebenchError, RecipeError, RunError
from mergebench.evaluation import Record, Results, comparison_report, markdown, report, save
from mergebench.evaluation.compare.comparison import against
from mergebench.evaluation.compare.flips import flips
from mergebench.evaluation.tables.flips import items_sheet
from mergebench.evaluation.task import LONGEST, Direction, Item, Prediction, cut

GOLD, OLD, NEW = "01201201", "01200111", "01121010"  # the golden example of test_flips.py


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(item: Any, pred: Any, **more: Any) -> dict[str, Any]:
    return {"id": item, "pred": pred, **more}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes old.jsonl and new.jsonl into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
        lines(tmp_path / "old.jsonl", old)
        lines(tmp_path / "new.jsonl", new)

    return write


def record(model: str, task: str, right: str | list[float], role: Any = "input", **more: Any) -> Record:
    """`right`: for each item + or -, or its score. A wrong answer is 'no', a right one 'yes'."""
    scores = [float(one == "+") for one in right] if isinstance(right, str) else right
    answers = {f"{task}-{i}": Prediction("yes" if score else "no", score) for i, score in enumerate(scores)}
    whole: dict[str, Any] = {"split": "test", "metric": "accuracy", "direction": "higher", **more}
    value = sum(scores) / len(scores)
    return Record(
        model=model, role=role, task=task, value=value, stderr=None, n=len(scores), relative=None, seconds=1.0,
        predictions=answers, **whole,
    )  # fmt: skip


@pytest.fixture
def results() -> Results:
    return Results(
        {},
        (
            record("org/base", "a", "++++----", "base"),
            record("org/base", "b", "+++---", "base"),
            record("org/mine", "a", "+-+-++--", "merged"),
            record("org/mine", "b", "++++++", "merged"),
        ),
    )


# -- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [False, True])
def test_files(tmp_path: Path, listed: bool) -> None:
    for name, outputs in (("old", OLD), ("new", NEW)):
        rows = [row(i, int(one), gold=right) for i, (one, right) in enumerate(zip(outputs, GOLD, strict=True))]
        lines(tmp_path / name, rows if name == "old" or not listed else rows[::-1])
        if listed:  # and the order of the rows means nothing
            (tmp_path / name).write_text(json.dumps(rows, indent=1))
    (pair,) = (found := mergebench.compare(tmp_path / "old", str(tmp_path / "new"))).pairs
    assert (pair.flips.nfr, pair.flips.pfr, pair.flips.nfr_mc, pair.flips.btc) == (0.375, 0.125, 0.5, 0.4)
    assert (pair.flips.lost, pair.flips.won) == (("2", "3", "7"), ("4",))
    assert (pair.task, pair.metric, pair.gold["2"]) == ("items", "accuracy", "2")
    assert (found.old, found.new) == (str(tmp_path / "old"), str(tmp_path / "new"))


def test_scores_go_before_gold(files: Callable[..., None]) -> None:
    files(
        [row("x", "a", score=0.5, gold="a"), row("y", None, score=2)],
        [row("x", "b", score=0.25, gold="a"), row("y", "b", score=2.5)],
    )
    (pair,) = mergebench.compare("old.jsonl", "new.jsonl").pairs
    assert (pair.metric, pair.flips.lost, pair.flips.won, pair.flips.both_right) == ("score", ("x",), ("y",), None)
    assert (pair.flips.regression, pair.flips.gain, pair.gold) == (0.25, 0.5, {"x": "a"})


def test_what_counts_as_the_same_answer(files: Callable[..., None]) -> None:
    """Text, numbers and true as JSON writes them; no answer is a wrong one."""
    pairs = [("1", 1, 1), (True, "true", 1), (0.5, 0.5, 1), (None, "a", 0), ("", "a", 0), ("a ", "a", 0), ("A", "a", 0)]
    files(*[[row(i, pred, gold=gold) for i, (pred, gold, _) in enumerate(pairs)]] * 2)
    (pair,) = mergebench.compare("old.jsonl", "new.jsonl").pairs
    assert [answer.score for answer in pair.old.values()] == [right for *_, right in pairs]


GOOD = [row(1, "a", gold="a"), row(2, "b", gold="a")]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (GOOD, [*GOOD, row(1, "c", gold="a")], r"new.jsonl:3: id '1' is in .*new.jsonl:1 already"),
        (GOOD, GOOD[:1], r"old.jsonl, new.jsonl: the new answers lack 1 of the other's 2 items: 2"),
        (GOOD[1:], GOOD, r"the old answers lack 1 of the other's 2 items: 1"),
        (GOOD, [GOOD[0], row(2, "b")], r"new.jsonl:2: no column 'gold', it has id, pred"),
        (GOOD, [{"pred": "a", "gold": "a"}], r"new.jsonl:1: no column 'id', it has pred, gold"),
        (GOOD, [{"id": 1, "gold": "a"}], r"new.jsonl:1: no column 'pred', it has id, gold"),
        ([row(1, "a", score=1), row(2, "b", gold="a")], GOOD, r"old.jsonl:2: it has no score, unlike those before it"),
        (GOOD, [GOOD[0], row(2, "b", gold="a", score=1)], r"new.jsonl:2: it has a score, unlike those before it"),
        (GOOD, [row(1, "a", score=1), row(2, "b", score=0)], r"new.jsonl has scores, old.jsonl has none"),
        (GOOD, [GOOD[0], row(2, "b", gold="b")], r"item '2': gold is 'a' in old.jsonl and 'b' in new.jsonl"),
        (GOOD, [row(1, ["a"], gold="a")], r"new.jsonl:1: pred must be text or a number, got \[\"a\"\]"),
        (GOOD, [row(1, "a", gold=None)], r"new.jsonl:1: gold must be text or a number, got null"),
        (GOOD, [row(1, "a", score="1")], r"new.jsonl:1: score must be a finite number, got \"1\""),
        (GOOD, [row(1, "a", score=float("nan"))], r"new.jsonl:1: score must be a finite number, got NaN"),
        (GOOD, [row(None, "a", gold="a")], r"new.jsonl:1: id must be text or a whole number, got null"),
        (GOOD, [], r"new.jsonl: it holds no items"),
    ],
)
def test_files_that_do_not_fit(files: Callable[..., None], old: Any, new: Any, says: str) -> None:
    files(old, new)
    with pytest.raises(RunError, match=says) as caught:
        mergebench.compare("old.jsonl", "new.jsonl")
    assert "suite" not in (caught.value.hint or "")


def test_no_such_file(files: Callable[..., None]) -> None:
    files(GOOD, GOOD)
    with pytest.raises(RecipeError, match=r"nwe\.jsonl: no file of predictions") as caught:
        mergebench.compare("old.jsonl", "nwe.jsonl")
    assert "--in" in (caught.value.hint or "")
    with pytest.raises(RecipeError, match=r"evaluation\.json: no file of predictions"):
        mergebench.compare(lines(Path("evaluation.json"), GOOD), "new.jsonl")


# -- rows of an evaluation ---------------------------------------------------------------------------


def test_rows(results: Results, tmp_path: Path) -> None:
    found = mergebench.compare("org/base", "org/mine", results)
    a, b = (pair.flips for pair in found.pairs)
    assert (a.lost, a.won, b.lost, b.won) == (("a-1", "a-3"), ("a-4", "a-5"), (), ("b-3", "b-4", "b-5"))
    assert found.pooled is not None
    assert (found.pooled.n, len(found.pooled.lost), len(found.pooled.won)) == (14, 2, 5)
    assert (found.pooled.both_right, found.pooled.both_wrong) == (5, 2)
    assert found.pooled.p == pytest.approx(math.erfc(3 / 7**0.5 / 2**0.5))  # three more won than lost, of seven
    assert found.pooled.lost == (("a", "test", "a-1"), ("a", "test", "a-3"))

    save(results, tmp_path)  # from disk, by the names of the table
    for place in (tmp_path, str(tmp_path / "evaluation.json")):
        assert mergebench.compare("base", "mine", place).to_dict() == found.to_dict()


def test_items_are_pooled_where_they_count_alike() -> None:
    def both(*tasks: tuple[str, Any, str, Direction]) -> Results:
        return Results({}, tuple(record(m, t, s, metric=x, direction=d) for m in ("x", "y") for t, s, x, d in tasks))

    right: Any = ("a", "++-", "accuracy", "higher")
    exact: Any = ("b", "+-", "exact_match", "higher")
    perplexity: Any = ("c", [9.5, 8.5], "perplexity", "lower")
    again: Any = ("d", [7.5, 3.5], "perplexity", "lower")
    shares: Any = ("e", [0.5, 0.25], "f1", "higher")
    by_chance: Any = ("f", "++-", "f1", "higher")
    for tasks, pooled in [
        ((right, exact, perplexity), 5),
        ((perplexity, again), 4),
        ((perplexity, shares), None),
        ((shares,), 2),
        ((shares, by_chance), 5),  # the same measure, though every score of one happens to be 0 or 1
    ]:
        found = mergebench.compare("x", "y", both(*tasks)).pooled
        assert (found and found.n) == pooled


def test_one_task_in_both_splits_and_items_of_one_name() -> None:
    splits = [record(m, "a", s, split=p) for m, s in (("x", "+-"), ("y", "-+")) for p in ("validation", "test")]
    found = mergebench.compare("x", "y", Results({}, tuple(splits)))
    assert found.pooled is not None and found.pooled.n == 4
    assert " a (validation) " in comparison_report(found)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"right": "++"}, "task 'b': the new answers lack 4 of the other's 6 items: b-2, b-3, b-4, …"),
        ({"metric": "f1"}, "task 'b': 'org/base' has accuracy, 'org/mine' has f1"),
        ({"task": "c"}, "'org/mine' has no result on 'b', 'org/base' has"),
    ],
)
def test_rows_that_do_not_fit(results: Results, changed: dict[str, Any], says: str) -> None:
    other = record("org/mine", **{"task": "b", "right": "++++++", **changed})
    with pytest.raises(RunError, match=says):
        mergebench.compare("base", "mine", Results({}, (*results.records[:3], other)))


def test_what_failed_is_said_again(results: Results) -> None:
    failed = {"model": "org/mine", "tasks": ["b"], "error": "model 'org/mine': out of memory", "hint": "a larger one"}
    with pytest.raises(RunError, match="no result on 'b', 'org/base' has: model 'org/mine': out of memory") as caught:
        mergebench.compare("base", "mine", Results({"failed": [failed]}, results.records[:3]))
    assert caught.value.hint == "a larger one"
    with pytest.raises(RunError, match=r"^model 'org/mine': out of memory"):
        mergebench.compare("base", "org/mine", Results({"failed": [failed]}, results.records[:2]))


def test_unknown_names_and_evaluations(results: Results, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no model in the evaluation is called 'bsae'") as caught:
        mergebench.compare("bsae", "mine", results)
    assert caught.value.hint == "did you mean 'base'?"
    with pytest.raises(RunError, match=r"evaluation\.json: cannot be read"):
        mergebench.compare("base", "mine", tmp_path / "evaluation.json")


# -- every model against the baseline ----------------------------------------------------------------


def test_the_baseline(results: Results) -> None:
    assert [(one.old, one.new) for one in against(results)] == [("org/base", "org/mine")]
    chosen = Results({"baseline": "org/mine"}, results.records)
    assert [(one.old, one.new) for one in against(chosen)] == [("org/mine", "org/base")]
    gone = Results({"baseline": "another"}, results.records[::-1])  # the base wherever it stands
    assert [(one.old, one.new) for one in against(gone)] == [("org/base", "org/mine")]
    baseless = Results({}, (*results.records[2:], record("z", "a", "+" * 8)))
    assert [(one.old, one.new) for one in against(baseless)] == [("org/mine", "z")]
    assert against(Results({}, ())) == []


def test_only_what_both_answered(results: Results) -> None:
    """A failed task, other items or another metric leave out a task, never the evaluation."""
    base = results.records[:2]
    (one,) = against(Results({}, (*base, results.records[2], record("org/mine", "b", "++"))))
    assert [pair.task for pair in one.pairs] == ["a"]
    assert against(Results({}, (*base, record("org/mine", "a", "+" * 8, metric="f1")))) == []
    assert against(Results({}, (*base, record("org/mine", "c", "+")))) == []
    nothing = tuple(replace(one, predictions={}) for one in results.records)  # as a later version may leave them out
    assert against(Results({}, nothing)) == []


def test_the_document_has_the_comparisons(results: Results, tmp_path: Path) -> None:
    save(results, tmp_path)
    document = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    (found,) = document["comparisons"]
    expected = mergebench.compare("base", "mine", results)
    assert (found["old"], found["new"]) == ("org/base", "org/mine")
    assert [one["task"] for one in found["tasks"]] == ["a", "b"]
    assert found["tasks"][0] == json.loads(json.dumps(expected.pairs[0].to_dict(items=False)))
    assert found["tasks"][0].items() >= {"split": "test", "nfr": 0.25, "pfr": 0.25, "lost": 2, "btc": 0.5}.items()
    assert expected.pooled is not None
    assert found["pooled"] == json.loads(json.dumps(expected.pooled.to_dict()))
    assert "lost_items" not in found["tasks"][0]
    assert expected.to_dict()["tasks"][0]["lost_items"] == ["a-1", "a-3"]
    assert Results.load(tmp_path) == results


AGAINST = """\
 against base            difference      p       lost        won
 ────────────────────────────────────────────────────────────────
 mine          +21.4 [−16.6, +53.4]  0.257  2 (14.3%)  5 (35.7%)

 Difference [95% interval]: in the share of the 14 items answered
 right, in %; above 0 is better. p: McNemar's test. lost, won: items
 that became worse and better."""

IN_MARKDOWN = """
| against base | difference | p | lost | won |
| --- | ---: | ---: | ---: | ---: |
| mine | +21.4 \\[−16.6, +53.4\\] | 0.257 | 2 (14.3%) | 5 (35.7%) |

Difference"""


def test_the_second_table(results: Results) -> None:
    assert report(results).endswith(AGAINST)
    assert IN_MARKDOWN in markdown(results)


def test_the_second_table_of_scores() -> None:
    lower: Any = {"metric": "perplexity", "direction": "lower"}
    found = Results(
        {}, (record("base", "t", [20.0, 30.0, 25.0], **lower), record("x", "t", [10.0, 31.0, 24.0], **lower))
    )
    text = report(found)
    assert "against base" in text and "+3.33 [−1, +10]" in text and "1 (33.3%)  2 (66.7%)" in text
    assert "above 0 is" in text and "a paired bootstrap" in text


REPORT = """\
 old: org/base
 new: org/mine

 task     n   old    new            difference      p   NFR   PFR  NFR_mc    BTC  expected
 ──────────────────────────────────────────────────────────────────────────────────────────
 a        8  50.0   50.0    0.0 [−46.3, +46.3]  1.000  25.0  25.0    25.0   50.0      25.0
 b        6  50.0  100.0   +50.0 [−8.6, +81.2]  0.083   0.0  50.0     0.0  100.0       0.0

 pooled  14  50.0   71.4  +21.4 [−16.6, +53.4]  0.257  14.3  35.7    14.3   71.4      14.3

 Shares in %. Difference [95% interval], p by McNemar's test; NFR, PFR: items the new
 model lost and won; NFR_mc: lost, or wrong in another way; BTC: what is still right of
 what was; expected: the NFR if the two erred independently.

 task    both right  lost  won  both wrong  of them differently
 ───────────────────────────────────────────────────────────────
 a                2     2    2           2                    0
 b                3     0    3           0                    0
 pooled           5     2    5           2                    0

 The first 4 of 7 items that flipped, those lost first:
 a, a-1: lost: yes → no
 a, a-3: lost: yes → no
 a, a-4: won: no → yes
 b, b-3: won: no → yes"""


def test_the_report_of_two(results: Results) -> None:
    assert comparison_report(mergebench.compare("base", "mine", results), items=4) == REPORT


def test_answers_are_shown_not_obeyed(files: Callable[..., None]) -> None:
    files([row("[red]i", "a\x1b[2Jb\n" + "w" * 90, gold="g")], [row("[red]i", "g", gold="g")])
    text = comparison_report(mergebench.compare("old.jsonl", "new.jsonl"))
    assert "\x1b" not in text and " items, [red]i: won: a\\x1b[2Jb w" in text and "Every item that flipped" in text
    assert max(map(len, text.splitlines())) <= 100


def test_scores_in_the_report(files: Callable[..., None]) -> None:
    files([row("x", "a", score=0.5), row("y", "b", score=1.5)], [row("x", "c", score=0.25), row("y", "b", score=2)])
    text = comparison_report(mergebench.compare("old.jsonl", "new.jsonl"))
    assert "+0.125 [−0.25, +0.5]" in text and "paired bootstrap" in text
    assert " items, x: lost, 0.5 → 0.25: a → c" in text and " items, y: won, 1.5 → 2: b → b" in text
    assert ["items", "–", "1", "1", "–", "–", "0.25", "0.5"] in [line.split() for line in text.splitlines()]


def test_right_and_wrong_are_in_percent_whatever_the_metric(results: Results) -> None:
    renamed = Results({}, tuple(replace(one, metric="exact_match") for one in results.records))
    assert comparison_report(mergebench.compare("base", "mine", renamed), items=4) == REPORT
    assert AGAINST.splitlines()[2] in report(renamed)


def test_the_identity_of_the_views(results: Results) -> None:
    """What the views print is what `flips` says of the records' answers."""
    old, new = results.of("org/base")["a"], results.of("org/mine")["a"]
    assert mergebench.compare("base", "mine", results).pairs[0].flips == flips(old.predictions, new.predictions)
    assert issubclass(RunError, MergebenchError)


# -- the items themselves ----------------------------------------------------------------------------


def test_flipped_items_say_what_they_ask(results: Results, tmp_path: Path) -> None:
    """From the evaluation's file to the terminal, JSON and Markdown; a long text is cut before it is kept."""
    texts = {f"a-{i}": Item(f"question {i}", "yes") for i in range(8)}
    save(Results({}, results.records, {"a": texts}), tmp_path)
    found = mergebench.compare("base", "mine", tmp_path)
    first = found.to_dict()["tasks"][0]["flipped"][0]
    assert first == {
        "item": "a-1", "what": "lost", "old": "yes", "old_score": 1.0, "new": "no", "new_score": 0.0, "gold": "yes",
        "text": "question 1",
    }  # fmt: skip
    assert [one["item"] for one in found.to_dict()["tasks"][0]["flipped"]] == ["a-1", "a-3", "a-4", "a-5"]
    text = comparison_report(found, items=1).splitlines()
    assert text[-2:] == [" a, a-1: lost: yes → no (right: yes)", "   question 1"]
    assert "question" not in comparison_report(found, items=0)
    assert "| a | a-1 | lost | yes | no | yes | question 1 |" in items_sheet(found, 3).markdown()


def test_what_is_kept_of_a_text() -> None:
    assert cut("a\n b") == "a b"
    assert len(cut("x" * 1000)) == LONGEST and cut("y " * 100_000).endswith("y…")
    assert cut(" " * 5000 + "z").endswith("…")


def test_files_may_say_what_they_ask(files: Callable[..., None]) -> None:
    files([row("x", "a", gold="a", text="why?")], [row("x", "b", gold="a")])
    (pair,) = mergebench.compare("old.jsonl", "new.jsonl").pairs
    assert (pair.flipped[0].text, pair.flipped[0].gold) == ("why?", "a")


def test_predictions_in_a_table(tmp_path: Path) -> None:
    """CSV's cells are texts: a score there is a number all the same."""
    (tmp_path / "old.csv").write_text("id,pred,score\n007,yes,0.5\n8,no,1\n")
    (tmp_path / "new.csv").write_text("score,id,pred\n0.25,007,yes\n1,8,no\n")
    (pair,) = mergebench.compare(tmp_path / "old.csv", tmp_path / "new.csv").pairs
    assert (pair.flips.lost, pair.flips.difference) == (("007",), -0.125)
    (tmp_path / "new.csv").write_text("score,id,pred\nmuch,007,yes\n")
    with pytest.raises(RunError, match=r"new.csv:2: score must be a finite number"):
        mergebench.compare(tmp_path / "old.csv", tmp_path / "new.csv")
