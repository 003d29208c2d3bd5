"""Logs that lm-eval and inspect write, compared as they are."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest

import mergebench
from mergebench.errors import RunError
from mergebench.evaluation import harness
from mergebench.evaluation.compare.verdict import Policy, judge
from tests.language import write_rows


def lm_eval_run(folder: Path, seed: int) -> list[dict[str, Any]]:
    """A run of lm-eval by itself, with answers by chance; its samples."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.dummy import DummyLM

    documents = [{"q": f"w{i}", "gold": i % 2} for i in range(20)]
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    task = harness.local_task(
        "multiple_choice", documents, doc_to_text=lambda one: one["q"], doc_to_choice=lambda one: ["a", "bcd"],
        doc_to_target=lambda one: one["gold"], metric_list=metrics,
    )  # fmt: skip
    with harness.undisturbed(seed):
        random.seed(seed)
        out = lm_eval.evaluate(lm=DummyLM(), task_dict={"local": task}, bootstrap_iters=0)
        samples = out.pop("samples")["local"]
        tracker = EvaluationTracker(output_path=str(folder))
        tracker.general_config_tracker.model_name_sanitized = "somebody__model"
        tracker.save_results_aggregated(results=out, samples={"local": samples})
        tracker.save_results_samples("local", samples)
    return samples


def test_lm_evals_samples(tmp_path: Path) -> None:
    old, new = (lm_eval_run(tmp_path / name, seed) for seed, name in enumerate(("old", "new")))
    lost = [str(one["doc_id"]) for one, other in zip(old, new, strict=True) if one["acc"] > other["acc"]]
    files = [next((tmp_path / name).rglob("samples_*.jsonl")) for name in ("old", "new")]
    for pair in (files, [tmp_path / "old", tmp_path / "new"]):
        found, normalised = mergebench.compare(*pair).pairs
        assert (found.task, found.metric, found.direction) == ("local", "acc", "higher")
        assert (normalised.task, normalised.metric) == ("local", "acc_norm")
        judged = judge(mergebench.compare(*pair), Policy()).rows
        assert [row.task for row in judged] == ["local (acc)", "local (acc_norm)"]
        sums = [sum(one["acc_norm"] for one in samples) for samples in (old, new)]
        assert normalised.flips.difference == pytest.approx((sums[1] - sums[0]) / 20)
        assert found.flips.n == 20 and sorted(found.flips.lost) == sorted(lost) and lost
        assert found.gold["3"] == "bcd" and found.old.keys() == {str(i) for i in range(20)}


def sample(item: int, score: float, name: str = "none", **more: Any) -> dict[str, Any]:
    return {"doc_id": item, "filter": name, "filtered_resps": ["x"], "target": "x", "metrics": ["exact_match"],
            "exact_match": score, "doc_hash": f"h{item}", "prompt_hash": f"p{item}"} | more  # fmt: skip


def test_filters_tasks_and_later_runs(tmp_path: Path) -> None:
    for name, score in (("old", 1), ("new", 0)):
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        both = [sample(i, score, f) for f in ("strict", "flexible") for i in range(3)]
        write_rows(folder / "samples_gsm8k_2026-01-02T10-00-00.5.jsonl", both)
        write_rows(folder / "samples_gsm8k_2026-01-01T10-00-00.5.jsonl", [sample(0, 0.5)])
        times = {"metrics": ["bits_per_byte", "wer"], "bits_per_byte": [-6.0, 3]}
        write_rows(folder / "samples_text_2026-01-02T10-00-00.5.jsonl", [sample(7, 0, **times)])
    found = mergebench.compare(tmp_path / "old", tmp_path / "new")
    pairs = {(pair.task, pair.metric): pair for pair in found.pairs}
    names = {("gsm8k", "exact_match,strict"), ("gsm8k", "exact_match,flexible")}
    assert pairs.keys() == names | {("text", "bits_per_byte")}
    assert len(pairs["gsm8k", "exact_match,strict"].flips.lost) == 3
    text = pairs["text", "bits_per_byte"]
    assert text.direction == "lower" and text.old["7"].score == pytest.approx(2 / 0.6931471805599453)


@pytest.mark.parametrize(
    ("new", "says"),
    [
        ([sample(1, 1, doc_hash="other")], "item '1' is another one"),
        ([sample(1, 1, target="y")], "item '1' is another one"),
        ([sample(1, 1, prompt_hash="other")], "item '1' is asked in another way"),
        ([sample(1, 1, metrics=["f1"], f1=1)], "has exact_match, .* has f1"),
        ([sample(1, 1, metrics=["f1"], f1=[1])], r"samples_t.jsonl:1: no metric that is a number"),
        ([sample(1, 1), sample(1, 1)], r":2: doc_id '1' stands before already"),
    ],
)
def test_samples_that_do_not_fit(new: list[Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one = write_rows(tmp_path / "samples_t.jsonl", [sample(1, 1)])
    with pytest.raises(RunError, match=says):
        mergebench.compare(one, write_rows(tmp_path / "b" / "samples_t.jsonl", new))


def test_inspects_logs(tmp_path: Path) -> None:
    def log(right: set[int]) -> dict[str, Any]:
        samples = [
            {"id": i, "epoch": epoch, "target": "A", "scores": {"match": {"value": "C" if i in right else "I"}}}
            for i in range(4)
            for epoch in (1, 2)
        ]
        return {"version": 2, "eval": {"task": "x"}, "samples": samples}

    (tmp_path / "old.json").write_text(json.dumps(log({0, 1, 2}), indent=2))
    new = log({2, 3})
    with zipfile.ZipFile(tmp_path / "new.eval", "w") as archive:
        archive.writestr("header.json", json.dumps({"eval": new["eval"]}))
        for one in new["samples"]:
            archive.writestr(f"samples/{one['id']}_epoch_{one['epoch']}.json", json.dumps(one))
    (found,) = mergebench.compare(tmp_path / "old.json", tmp_path / "new.eval").pairs
    assert (found.task, found.metric) == ("x", "match")
    assert sorted(found.flips.lost) == ["0", "1"] and found.flips.n == 4  # its epochs are one item
    (tmp_path / "bad.eval").write_bytes(b"PK")
    with pytest.raises(RunError, match="not a readable log of inspect"):
        mergebench.compare(tmp_path / "old.json", tmp_path / "bad.eval")


def test_scorers_of_inspect_and_their_values(tmp_path: Path) -> None:
    def log(name: str, values: list[Any], asked: str = "q") -> Path:
        samples = [
            {"id": i, "target": "A", "input": [{"id": f"{name}{i}", "role": "user", "content": f"{asked}{i}"}],
             "scores": {"match": {"value": "C"}, "judge": {"value": {"kind": value, "brief": 1}}}}
            for i, value in enumerate(values)
        ]  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps({"eval": {"task": "x"}, "samples": samples}))
        return tmp_path / f"{name}.json"

    old, new = log("old", [1, 0, 0.5]), log("new", [0, 0, 1])
    found = {pair.metric: pair.flips for pair in mergebench.compare(old, new).pairs}
    assert list(found) == ["match", "judge, kind", "judge, brief"]
    assert (found["judge, kind"].lost, found["judge, kind"].won) == (("0",), ("2",))
    with pytest.raises(RunError, match="item '0' is asked in another way"):
        mergebench.compare(old, log("other", [1, 0, 0.5], asked="Q"))


def inspect_log(folder: Path, grades: list[Any], **more: Any) -> Path:
    """A log of inspect with so many samples, in a folder of its own."""
    samples = [
        {"id": i, "target": "A", "input": f"q{i}", "messages": [], "scores": {"match": {"value": grade}}}
        | (more if i == 1 else {}) for i, grade in enumerate(grades)
    ]  # fmt: skip
    about = {"task": "x", "model": more.get("model", "m"), "created": more.get("created", "2026-01-01")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{len(list(folder.iterdir()))}.json").write_text(json.dumps({"eval": about, "samples": samples}))
    return folder


def test_what_inspect_reads_as_a_number(tmp_path: Path) -> None:
    old = inspect_log(tmp_path / "old", ["C", "P", "I", "N", True, "yes", "No", "0.25", 1])
    (pair,) = mergebench.compare(old, old).pairs
    assert [answer.score for answer in pair.old.values()] == [1, 0.5, 0, 0, 1, 1, 0, 0.25, 1]
    with pytest.raises(RunError, match=r"sample 1 .id '0'.: its score must be"):
        mergebench.compare(old, inspect_log(tmp_path / "new", ["A"]))


def test_samples_of_inspect_that_failed(tmp_path: Path) -> None:
    old, new = inspect_log(tmp_path / "old", ["C", "C"]), tmp_path / "new"
    inspect_log(new, ["C", "C"], scores={}, error={"message": "TimeoutError()"})
    with pytest.raises(RunError, match=r"sample 2 .id '1'. failed: TimeoutError") as failed:
        mergebench.compare(old, new)
    assert str(failed.value.hint).startswith("run it again: inspect eval-retry")
    assert mergebench.compare(old, inspect_log(tmp_path / "again", ["C", "I"], created="2026-01-02")).pairs


def test_logs_of_inspect_without_samples(tmp_path: Path) -> None:
    """As `--no-log-samples` writes them: no key `samples` at all."""
    (tmp_path / "log.json").write_text(json.dumps({"version": 2, "status": "success", "eval": {"task": "x"}}))
    with pytest.raises(RunError, match="it holds no samples"):
        mergebench.compare(tmp_path / "log.json", tmp_path / "log.json")


def test_a_system_message_is_part_of_the_prompt(tmp_path: Path) -> None:
    """Where a solver puts it, the sample's input is the same."""

    def said(name: str, system: str, answer: str) -> Path:
        roles = [
            ("system", system, {}),
            ("user", "q1", {"source": "input"}),
            ("assistant", answer, {"source": "generate"}),
        ]
        messages = [
            {"id": f"{name}{i}", "role": role, "content": text} | more for i, (role, text, more) in enumerate(roles)
        ]
        return inspect_log(tmp_path / name, ["C", "C"], messages=messages)

    old = said("old", "Be brief.", "A")
    assert mergebench.compare(old, said("new", "Be brief.", "B")).pairs
    with pytest.raises(RunError, match="item '1' is asked in another way"):
        mergebench.compare(old, said("other", "Be long.", "A"))


def test_runs_of_inspect_in_one_folder(tmp_path: Path) -> None:
    old = inspect_log(tmp_path / "old", ["C", "C"], created="2026-01-02")
    inspect_log(old, ["I", "I"], created="2026-01-01")
    assert mergebench.compare(old, old).pairs[0].flips.old == 1
    with pytest.raises(RunError, match="several models on task 'x': m, other"):
        mergebench.compare(old, inspect_log(old, ["C", "C"], model="other", created="2026-01-03"))


def test_a_share_over_repeats_is_judged_in_points(tmp_path: Path) -> None:
    """What repeats leave between right and wrong is an accuracy still; a graded reward is not."""
    old, new = (nemo_run(tmp_path / name, [1.0, 1, 1, 1, 0, 1, 1, 1], repeats=2) for name in ("old", "new"))
    results = new / "gpqa" / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    write_rows(results, [row | {"reward": row["reward"] * (row["repeat"] == 0)} for row in rows])
    found = mergebench.compare(old, new)
    row = judge(found, Policy()).rows[0]
    assert found.pairs[0].flips.difference == pytest.approx(-7 / 16) and found.pairs[0].flips.both_right is None
    assert (row.verdict, row.limits.max_drop) == ("BLOCK", 0.01)
    graded = mergebench.compare(*(nemo_run(tmp_path / f"{n}", [1, 0.5, n, 0.25]) for n in (0.75, 0.5)))
    assert judge(graded, Policy()).rows[0].verdict is None


def nemo_run(folder: Path, rewards: list[float], repeats: int = 1, **more: Any) -> Path:
    """A bundle as NeMo Evaluator writes it."""
    bundle = {"run_id": "eval-1-gpqa", "benchmark": {"name": "gpqa", "samples": len(rewards), "scores": {}}}
    (folder / "gpqa").mkdir(parents=True)
    (folder / "gpqa" / "eval-1-gpqa.json").write_text(json.dumps(bundle))
    rows = [
        {"problem_idx": i, "repeat": k, "reward": reward, "scorer_rewards": {"scorer:exact": 1 - reward},
         "prompt": f"q{i}", "model_response": "long", "extracted_answer": "A", "expected_answer": "A"} | more
        for i, reward in enumerate(rewards) for k in range(repeats)
    ]  # fmt: skip
    write_rows(folder / "gpqa" / "results.jsonl", rows)
    return folder


def test_nemo_evaluators_bundles(tmp_path: Path) -> None:
    old, new = nemo_run(tmp_path / "old", [1, 1, 0, 0]), nemo_run(tmp_path / "new", [0, 1, 1, 1])
    places = ("", "gpqa/eval-1-gpqa.json", "gpqa/results.jsonl")
    for pair in ((old / place, new / place) for place in places):
        rewards, exact = mergebench.compare(*pair).pairs
        assert (rewards.task, rewards.metric, exact.metric) == ("gpqa", "reward", "scorer:exact")
        assert (rewards.flips.lost, rewards.flips.won, exact.flips.won) == (("0",), ("2", "3"), ("0",))
    results = new / "gpqa" / "results.jsonl"
    again = json.loads(results.read_text().splitlines()[0]) | {"reward": 1}
    results.write_text(results.read_text() + json.dumps(again) + "\n")  # problem 0 ran again
    assert mergebench.compare(old, new).pairs[0].flips.lost == ()
    twice = nemo_run(tmp_path / "twice", [1, 1, 0, 0], repeats=2)
    assert mergebench.compare(twice, twice).pairs[0].flips.n == 4
    with pytest.raises(RunError, match="item '0' is asked in another way"):
        mergebench.compare(old, nemo_run(tmp_path / "other", [1, 1, 0, 0], prompt="?"))
    with pytest.raises(RunError, match="reward must be a number"):
        mergebench.compare(old, nemo_run(tmp_path / "none", [1, 1, 0, 0], reward=None))
    results.unlink()
    with pytest.raises(RunError, match=r"no results\.jsonl beside it"):
        mergebench.compare(old, new)


def test_runs_of_two_evaluators(tmp_path: Path) -> None:
    nemo = nemo_run(tmp_path / "nemo", [1, 0])
    (tmp_path / "run").mkdir()
    lm_eval = write_rows(tmp_path / "run" / "samples_t.jsonl", [sample(1, 1)])
    with pytest.raises(RunError, match=r"run was written by lm-eval, .*nemo by NeMo Evaluator"):
        mergebench.compare(lm_eval.parent, nemo)
    with pytest.raises(RunError, match=r"is a log of lm-eval, .*own\.jsonl is not"):
        mergebench.compare(lm_eval, write_rows(tmp_path / "own.jsonl", [{"id": 1, "pred": "a", "gold": "a"}]))
    write_rows(nemo / "samples_t.jsonl", [sample(1, 1)])
    with pytest.raises(RunError, match="it holds logs of lm-eval and of NeMo Evaluator"):
        mergebench.compare(nemo, nemo)
