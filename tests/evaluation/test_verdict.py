"""Verdicts on what a new model may lose, and the policies of a gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench.errors import RecipeError
from mergebench.evaluation.compare.comparison import Comparison, Pair
from mergebench.evaluation.compare.inference import mcnemar, score
from mergebench.evaluation.compare.policy import load_policy
from mergebench.evaluation.compare.verdict import Limits, Policy, judge
from mergebench.evaluation.task import Prediction
from tests.conftest import Cli
from tests.language import write_rows


def pair(task: str, n: int, lost: int, won: int = 0) -> Pair:
    """Of n items as many lost and won, the others right."""
    old = {str(i): Prediction("a", float(not lost <= i < lost + won)) for i in range(n)}
    new = {str(i): Prediction("a", float(i >= lost)) for i in range(n)}
    return Pair(task, "", "accuracy", "higher", old, new)


def graded(task: str, changes: list[float]) -> Pair:
    old = {str(i): Prediction("", 1.0) for i in range(len(changes))}
    return Pair(task, "", "bits", "lower", old, {str(i): Prediction("", 1 - d) for i, d in enumerate(changes)})


def verdicts(policy: Policy, *pairs: Pair) -> dict[str, str | None]:
    return {row.task: row.verdict for row in judge(Comparison("old", "new", pairs), policy).rows}


@pytest.mark.parametrize("n", [20, 300, 3000])
@pytest.mark.parametrize("most", [0.0, 0.01, 0.05])
def test_the_verdict_is_that_of_two_tests(n: int, most: float) -> None:
    """Worse than before, and not worse than allowed: each a score test of the counts."""
    seen = set()
    for lost, won in [(0, 0), (1, 0), (5, 1), (10, 2), (n // 10, n // 60), (n // 40, n // 60), (2, n // 5), (6, 6)]:
        worse = won < lost and mcnemar(lost, won) < 0.05
        excluded = score(lost, won, n, -most) >= 1.959964 if lost or won or most else False
        beyond = (lost - won) / n > most
        expected = ("BLOCK" if beyond else "WARN") if worse else "PASS" if excluded else "INCONCLUSIVE"
        assert verdicts(Policy(Limits(max_drop=most)), pair("t", n, lost, won)) == {"t": expected}, (lost, won)
        seen.add(expected)
    assert len(seen) >= 2


@pytest.mark.parametrize(("n", "lost", "won"), [(300, 28, 24), (1000, 20, 14), (150, 40, 45)])
def test_a_detectable_difference_is_detected_four_times_in_five(n: int, lost: int, won: int) -> None:
    found = pair("t", n, lost, won).flips
    assert found.detectable is not None
    flips, source = (lost + won) / n, np.random.default_rng(0)
    shares = [(flips + found.detectable) / 2, (flips - found.detectable) / 2, 1 - flips]
    drawn = source.multinomial(n, shares, 4000)
    power = np.mean([mcnemar(int(worse), int(better)) < 0.05 for worse, better, _ in drawn])
    assert 0.77 < power < 0.87


def test_a_detectable_difference_of_scores() -> None:
    changes = np.random.default_rng(1).normal(0, 0.5, 400)
    found = graded("t", list(changes)).flips
    assert found.detectable == pytest.approx(2.8016 * changes.std() / 20, rel=0.05)  # 2.8 standard errors
    assert pair("t", 100, 0).flips.detectable == 0.04  # four flips, if none has been seen
    assert mcnemar(4, 0) < 0.05 < mcnemar(3, 0)


def test_a_policy(tmp_path: Path) -> None:
    """Points of a task of right and wrong, the unit of another; what is advisory decides nothing."""
    pairs = (pair("a", 1000, 30), pair("b", 1000, 30), graded("g", [-0.2] * 30 + [-0.1] * 30), graded("h", [-1.0] * 9))
    found = Comparison("old", "new", pairs)
    (tmp_path / "gate.yaml").write_text(
        "max_drop: 5\nmax_nfr: 0.5\ntotal: {max_drop: 2}\n"
        "tasks:\n  b: {max_drop: 1, advisory: true}\n  g: {max_drop: 0.1}\n  a: {max_nfr: 0.03}\n"
    )
    policy = load_policy(tmp_path / "gate.yaml", found)
    assert policy.each == Limits(0.05, 0.5) and policy.tasks["g"].max_drop == 0.1 and policy.total == Limits(0.02)
    judged = judge(found, policy)
    assert {row.task: row.verdict for row in judged.rows} == {
        "a": "WARN", "b": "BLOCK", "g": "BLOCK", "h": "BLOCK", "total": "BLOCK",
    }  # fmt: skip
    assert {row.task: row.reasons for row in judged.rows if row.reasons} == {
        "b": ("drop",), "g": ("drop", "nfr"), "h": ("nfr",), "total": ("drop",),
    }  # fmt: skip
    alone = judge(Comparison("old", "new", pairs[:2]), Policy(Limits(0.05), {"b": Limits(0.01, advisory=True)}))
    assert (alone.verdict, alone.passed) == ("WARN", True)
    assert verdicts(Policy(Limits(0.05), {"gone": Limits()}), pairs[0]) == {"a": "WARN", "gone": "BLOCK"}
    assert verdicts(Policy(), pairs[3]) == {"h": None}  # bits are no points


@pytest.mark.parametrize(("blocks", "passed"), [(True, False), (False, True)])
def test_what_cannot_be_told(blocks: bool, passed: bool) -> None:
    judged = judge(Comparison("old", "new", (pair("t", 20, 1),)), Policy(inconclusive_blocks=blocks))
    assert (judged.verdict, judged.passed) == ("INCONCLUSIVE", passed)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a policy is a mapping"),
        ("tasks: {}", "it limits nothing"),
        ("max_dorp: 1", r"1:1: max_dorp: no such key"),
        ("max_drop: -1", r"max_drop: must be a number from 0 to 100, got -1"),
        ("max_nfr: 2", "must be a number from 0 to 1"),
        ("max_nfr: .nan", "got nan|not|number"),
        ("tasks: [a]", "tasks: must be a mapping of names"),
        ("tasks: {a: {advisory: 1}}", "must be true or false"),
        ("tasks: {a: {limit: 1}}", "no such key"),
        ("total: {advisory: true}", "no such key"),
        ("max_drop: 1\ninconclusive: maybe", "2:1: inconclusive: must be pass or block"),
    ],
)
def test_policies_that_are_not_valid(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text(text)
    with pytest.raises(RecipeError, match=says):
        load_policy(tmp_path / "gate.yaml", Comparison("old", "new", (pair("a", 9, 1),)))


def test_the_gate_of_a_policy(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, wrong in (("old", 0), ("new", 10)):
        rows: list[Any] = [{"id": i, "pred": "b" if i < wrong else "a", "gold": "a"} for i in range(400)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    gate = Path("gate.yaml")
    gate.write_text("max_drop: 2\n")
    ran = cli("compare", "old.jsonl", "new.jsonl", "--policy", gate)
    assert ran.code == 4 and ran.err.splitlines()[0] == "error: BLOCK: items: −2.5 [−4.5, −1.4], −2.0 is allowed"
    assert " items BLOCK −2.5 [−4.5, −1.4] −2.0 2.2 " in " ".join(ran.out.split())
    gate.write_text("max_drop: 3\n")
    ran = cli("compare", "old.jsonl", "new.jsonl", "--policy", gate, "--json")
    document = json.loads(ran.out)["gate"]
    assert ran.code == 0 and (document["verdict"], document["passed"]) == ("WARN", True)
    assert document["tasks"][0].items() >= {"task": "items", "verdict": "WARN", "max_drop": 0.03}.items()
    gate.write_text("max_drop: 3\ntasks: {news: {}}\n")
    ran = cli("compare", "old.jsonl", "new.jsonl", "--policy", gate)
    assert ran.code == 4 and ran.err.startswith("error: BLOCK: news: not measured\n")
    ran = cli("compare", "old.jsonl", "new.jsonl", "--policy", gate, "--max-drop", "1")
    assert ran.code == 2 and ran.err.startswith("error: --max-drop and --policy: two places for a limit\n")
    assert cli("compare", "old.jsonl", "new.jsonl", "--policy", "gone.yaml").code == 2
    assert json.loads(cli("compare", "old.jsonl", "new.jsonl", "--json").out)["verdict"]["verdict"] == "BLOCK"
