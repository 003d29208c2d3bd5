"""`mergebench dimension`: the search, its answer in numbers and words, a killed one, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergebench.errors import MergebenchError
from mergebench.systems.intrinsic_dimension import search as module
from mergebench.systems.intrinsic_dimension.answer import Answer
from mergebench.systems.intrinsic_dimension.search import narrow, search
from mergebench.training import load_config, once, run
from tests.conftest import Cli
from tests.training.trainable import classify, complete


@pytest.mark.parametrize("line", [1, 2, 9, 10, 11, 100, 731, 5000, 39_999, 40_000])
@pytest.mark.parametrize("least", [1, 105])
def test_the_search_ends_close_above_the_line(line: int, least: int) -> None:
    asked: list[int] = []
    narrow(lambda d: asked.append(d) is None and d >= line, least, 40_000)
    assert len(set(asked)) == len(asked) <= 9
    above, below = min(d for d in asked if d >= line), max([least, *(d for d in asked if d < line)])
    assert above / below <= 1.3 or above - below <= 1


def test_the_search_ends_where_nothing_is_enough() -> None:
    asked: list[int] = []
    narrow(lambda d: asked.append(d) is not None, 1, 5000)
    assert asked == [10, 100, 1000, 5000]


def test_the_answer() -> None:
    tested = {10: [0.5, 0.6], 100: [0.74, 0.9], 50: [0.7, 0.73], 70: [0.73, 0.71]}
    one = Answer("said", "accuracy", 0.9, 0.8, 1234, tested)
    assert (one.dimension, one.below, one.by_seed) == (70, 50, [70, 50])
    assert one.sentence() == (
        "said: 70 of 1,234 dimensions reach 90% of full fine-tuning's accuracy (72.0 of 80.0%), 50 do not; "
        "over 2 seeds 50 to 70"
    )
    high = Answer("did", "accuracy", 0.9, 1.0, 9, {10: [0.2, 1.0], 20: [0.85, 0.95]})
    assert (high.dimension, high.below, high.by_seed) == (20, 10, [None, 10])
    assert high.sentence().endswith("over 2 seeds 10 to more than 20")
    none = Answer("did", "accuracy", 0.9, 0.8, 1234, {10: [0.5]})
    assert none.dimension is None and none.below == 10
    assert none.sentence().startswith("did: none of up to 10 dimensions reaches")


def config(folder: Path, **more: Any) -> dict[str, Any]:
    rows = {
        "full": {"delta": "full", "lr": 3e-3},
        "did": {"delta": {"kind": "subspace", "head": True}, "lr": 0.03},
    }
    return classify(folder, **({"max_steps": 2} | {"rows": rows} | more))


@pytest.mark.slow
def test_a_killed_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(module, "CLOSE", 9)
    loaded = load_config(config(tmp_path, seeds=[3]))
    whole = search(loaded, tmp_path / "whole", share=0.5, device="cpu")
    assert [one["row"] for one in whole.provenance["runs"]] == ["full", "did/d-10", "did/d-3"]

    done: list[str] = []
    kept = run.train_once

    def killed(one: once.Once, *more: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(one.row.name)
        return kept(one, *more)

    monkeypatch.setattr(run, "train_once", killed)
    with pytest.raises(KeyboardInterrupt):
        search(loaded, tmp_path / "out", share=0.5, device="cpu")
    assert not (tmp_path / "out").exists()
    again: list[str] = []
    monkeypatch.setattr(run, "train_once", lambda one, *more: again.append(one.row.name) or kept(one, *more))
    found = search(loaded, tmp_path / "out", share=0.5, device="cpu", resume=True)
    assert again == ["did/d-3"]
    assert found.answers == whole.answers
    assert found.answers[0].tested[10] == [
        one["test"]["value"] for one in found.provenance["runs"] if one["row"] == "did/d-10"
    ]
    assert search(loaded, tmp_path / "out", share=0.5, device="cpu", resume=True).already_done
    assert (tmp_path / "out/dimension.png").stat().st_size > 1000
    assert json.loads((tmp_path / "out/results.json").read_text())["answers"]["did"]["full"] > 0
    assert (tmp_path / "out/did/d-10/seed-3/delta.safetensors").is_file()


def test_the_command(tmp_path: Path, cli: Cli, one_thread: None) -> None:
    """Without a row to compare with, all weights are trained first, with the same settings."""
    written = classify(tmp_path, max_steps=1, delta={"kind": "subspace", "said": True})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    ran = cli("dimension", tmp_path / "config.yaml", "--out", tmp_path / "out", "--share", "0.01", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("subspace: ") and " of full fine-tuning's accuracy" in ran.out
    assert (tmp_path / "out/full/seed-0/model.safetensors").is_file()
    again = cli(
        "dimension", tmp_path / "config.yaml", "--out", tmp_path / "out", "--share", "0.01", "--resume", "--json"
    )
    answer = json.loads(again.out)["answers"]["subspace"]
    assert (again.code, again.err, answer["dimension"]) == (0, "", min(map(int, answer["tested"])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": {"a": {"delta": "full"}}}, "no row trains in a subspace"),
        (
            {"rows": {"a": {"delta": "full"}, "b": {"delta": "bias"}, "c": {"delta": "subspace"}}},
            "rows: a, b: subspaces are compared with one",
        ),
        ({"rows": {"c": {"delta": {"kind": "subspace", "d": 5}}}}, "c: delta: d: it is what is searched"),
    ],
)
def test_what_cannot_be_searched(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(MergebenchError, match=message):
        search(load_config(config(tmp_path, **change)), tmp_path / "out")


def test_something_must_be_measured(tmp_path: Path) -> None:
    written = complete(tmp_path, delta="subspace")
    written["task"] = {"kind": "completion", "train": written["task"]["train"]}
    with pytest.raises(MergebenchError, match="task: no test items"):
        search(load_config(written), tmp_path / "out")


def test_a_share_is_a_share(tmp_path: Path) -> None:
    with pytest.raises(MergebenchError, match="--share"):
        search(load_config(config(tmp_path)), tmp_path / "out", share=90)
