"""Logs as lm-eval 0.4.13 (SmolLM2-135M and a copy with noise) and inspect 0.3.285 (its mock model) wrote them."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mergebench
from mergebench.errors import RecipeError, RunError
from mergebench.evaluation.compare.comparison import Pair
from mergebench.evaluation.compare.policy import load_policy
from mergebench.evaluation.compare.verdict import judge
from tests.conftest import Cli

LOGS = Path(__file__).parent / "logs"
OLD, NEW = (LOGS / "lm_eval" / name for name in ("base", "noisy"))
ACCURACY = {
    "old": 1.0,
    "new": 1 / 3,
}  # of both scorers, in the head of inspect's logs: the mean over epochs, then items


def lines(run: Path, task: str) -> Iterator[dict[str, Any]]:
    (file,) = run.glob(f"samples_{task}_*.jsonl")
    return map(json.loads, file.read_text().splitlines())


def reported(run: Path) -> dict[str, Any]:
    (file,) = run.glob("results_*.json")
    found: dict[str, Any] = json.loads(file.read_text())["results"]
    return found


@pytest.fixture(scope="module")
def pairs() -> dict[tuple[str, str], Pair]:
    return {(pair.task, pair.metric): pair for pair in mergebench.compare(OLD, NEW).pairs}


def test_means_are_what_lm_eval_reports(pairs: dict[tuple[str, str], Pair]) -> None:
    names = ["acc", "acc_norm"], ["exact_match,strict-match", "exact_match,flexible-extract"]
    wanted = {("kinds", name) for name in names[0]} | {("sums", name) for name in names[1]}
    assert pairs.keys() == wanted | {("news", "bits_per_byte")}
    for task, metric in wanted:
        key = metric if "," in metric else f"{metric},none"
        means = tuple(reported(run)[task][key] for run in (OLD, NEW))
        assert (pairs[task, metric].flips.old, pairs[task, metric].flips.new) == pytest.approx(means)
    news = pairs["news", "bits_per_byte"]
    sizes = {str(one["doc_id"]): len(one["target"].encode()) for one in lines(OLD, "news")}
    for run, answers in ((OLD, news.old), (NEW, news.new)):
        of_all = sum(answers[item].score * size for item, size in sizes.items()) / sum(sizes.values())
        assert of_all == pytest.approx(reported(run)["news"]["bits_per_byte,none"])
    assert news.direction == "lower" and not news.gold


def test_every_number_by_hand(pairs: dict[tuple[str, str], Pair]) -> None:
    for metric in ("acc", "acc_norm"):
        before, after = ([one[metric] for one in lines(run, "kinds")] for run in (OLD, NEW))
        changes = [new - old for old, new in zip(before, after, strict=True)]
        lost, won, n = changes.count(-1), changes.count(1), len(changes)
        found = pairs["kinds", metric].flips
        assert (len(found.lost), len(found.won), found.n) == (lost, won, n) and lost
        assert (found.nfr, found.pfr, found.difference) == pytest.approx((lost / n, won / n, (won - lost) / n))
        assert found.p == pytest.approx(math.erfc(abs(won - lost) / math.sqrt(2 * (won + lost))))
        assert found.btc == pytest.approx(1 - lost / sum(before))
        assert found.detectable == pytest.approx(max(4, 2.8015852 * math.sqrt(lost + won)) / n)


def test_the_answer_is_the_one_that_the_metric_scored(pairs: dict[tuple[str, str], Pair]) -> None:
    """By likelihood and by likelihood a letter the model may choose differently; each is right where its score is 1."""
    chosen = []
    for metric in ("acc", "acc_norm"):
        pair = pairs["kinds", metric]
        assert pair.gold["0"] == "Paris"
        for answers in (pair.old, pair.new):
            assert {i: float(a.output == pair.gold[i]) for i, a in answers.items()} == {
                i: a.score for i, a in answers.items()
            }
        chosen.append([answer.output for answer in pair.new.values()])
    assert chosen[0] != chosen[1]


def test_filters_are_metrics_of_one_task() -> None:
    """So that no item is pooled twice."""
    found = mergebench.compare(OLD, NEW)
    assert [(pair.task, pair.metric) for pair in found.pooled_pairs] == [
        ("kinds", "acc"), ("sums", "exact_match,strict-match"),
    ]  # fmt: skip
    assert found.pooled is not None and found.pooled.n == 16


def test_epochs_are_one_item() -> None:
    pytest.importorskip("pyarrow")
    found = mergebench.compare(LOGS / "inspect" / "old", LOGS / "inspect" / "new")
    assert [pair.metric for pair in found.pairs] == ["match", "includes"]
    for pair in found.pairs:
        assert pair.flips.n == 3 and pair.flips.share and pair.flips.both_right is None
        assert (pair.flips.old, pair.flips.new) == pytest.approx((ACCURACY["old"], ACCURACY["new"]))
        assert pair.gold == {"2+2": "4", "3+4": "7", "6+7": "13"}


def test_a_folder_of_several_models(tmp_path: Path) -> None:
    """No model is chosen in silence."""
    shutil.copytree(LOGS / "lm_eval", tmp_path / "runs")
    with pytest.raises(RunError, match="several models on task 'kinds': base, noisy"):
        mergebench.compare(tmp_path / "runs", OLD)


def test_only_the_last_run_of_a_folder_counts(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "base")
    for file in NEW.iterdir():  # of a later time
        shutil.copy(file, tmp_path / "base")
    assert all(pair.flips.difference == 0 for pair in mergebench.compare(tmp_path / "base", NEW).pairs)


def test_a_policy_names_a_task_or_one_of_its_metrics(tmp_path: Path) -> None:
    found = mergebench.compare(OLD, NEW)
    gate = tmp_path / "gate.yaml"
    gate.write_text(
        'max_drop: 50\ntasks: {sums: {max_drop: 10}, "sums (exact_match,flexible-extract)": {max_drop: 90}}\n'
    )
    judged = {row.task: row.verdict for row in judge(found, load_policy(gate, found)).rows}
    assert judged["sums (exact_match,strict-match)"] == "BLOCK"
    assert judged["sums (exact_match,flexible-extract)"] == "WARN"
    kinds, graded = found.pairs[0], replace(found.pairs[0], metric="f1", direction="lower")
    both = replace(found, pairs=(kinds, graded))
    gate.write_text("tasks: {kinds: {max_drop: 2}}\n")  # points of the one, units of the other
    with pytest.raises(RecipeError, match="several units") as refused:
        load_policy(gate, both)
    assert refused.value.hint == "bound them one by one: 'kinds (acc)', 'kinds (f1)'"


def test_tables_for_a_pull_request(cli: Cli) -> None:
    """They say what was compared, and of a perplexity, which has no answers, the items' scores."""
    ran = cli("compare", OLD, NEW, "--format", "markdown", "--flips", "9")
    assert ran.code == 0 and f"old: {OLD}; new: {NEW}. Shares in %; news: bits" in ran.out.replace("\\", "")
    assert re.search(r"\| news \| \d \| lost \| 1\.\d+ \| [12]\.\d+ \| – \| \w+", ran.out)
