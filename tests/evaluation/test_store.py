"""What was measured is kept: never measured twice, never mistaken for something else, never trusted when damaged."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mergebench.deltas.open import open_model
from mergebench.evaluation import Candidate, Results, evaluate_models, load_suite
from mergebench.evaluation.store import Store
from tests.conftest import Cli
from tests.evaluation.conftest import write_encoder, write_head

Entry = Callable[..., dict[str, Any]]


@pytest.fixture
def models(place: Path) -> Path:
    for seed, name in enumerate("xy"):
        write_encoder(place / name, seed=seed)
    return place


def measure(tasks: list[dict[str, Any]], *names: str, folder: str = "kept") -> Results:
    suite = load_suite({"tasks": tasks})
    opened = [Candidate(name, "input", open_model(name)) for name in names]
    return evaluate_models(opened, suite, store=Store(Path(folder)))


def plain(results: Results) -> list[Any]:
    return [
        (r.model, r.task, r.value, r.stderr, r.n, r.metric, r.direction, dict(r.predictions)) for r in results.records
    ]


def test_nothing_is_measured_twice(models: Path, entry: Entry) -> None:
    tasks = [entry(), entry(name="b", limit=9)]
    first = measure(tasks, "x")
    again = measure(tasks, "x", "y")
    assert (first.made["known"], again.made["known"]) == (0, 2)
    assert plain(again)[:2] == plain(first)
    assert [r.seconds for r in again.records[:2]] == [r.seconds for r in first.records]
    anew = evaluate_models([Candidate(name, "input", open_model(name)) for name in "xy"], load_suite({"tasks": tasks}))
    assert plain(again) == plain(anew)


def test_names_and_places_do_not_count(models: Path, entry: Entry) -> None:
    measure([entry()], "x")
    shutil.move(models / "x", models / "elsewhere")
    shutil.copy(models / "data.jsonl", models / "copy.jsonl")
    assert measure([entry(name="other", data="copy.jsonl")], "elsewhere").made["known"] == 1


def test_the_split_does_not_count(models: Path, entry: Entry) -> None:
    measure([entry(split="validation")], "x")
    assert measure([entry(split="test")], "x").made["known"] == 1


def one_weight(place: Path) -> None:
    file = place / "x/model.safetensors"
    tensors = load_file(file)
    tensors["encoder.layer.1.output.dense.bias"][3] += 1
    save_file(tensors, file)


def one_label(place: Path) -> None:
    text = (place / "data.jsonl").read_text()
    (place / "data.jsonl").write_text(text.replace('"bad"', '"good"', 1))


def the_config(place: Path) -> None:
    config = json.loads((place / "x/config.json").read_text())
    (place / "x/config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))


def the_tokenizer(place: Path) -> None:
    with open(place / "x/tokenizer_config.json", "a") as file:
        file.write(" ")


def the_head(place: Path) -> None:
    write_head(place / "a", seed=9)


@pytest.mark.parametrize("change", [one_weight, one_label, the_config, the_tokenizer, the_head])
def test_whatever_changes_is_measured(change: Callable[[Path], None], models: Path, entry: Entry) -> None:
    measure([entry()], "x")
    change(models)
    assert measure([entry()], "x").made["known"] == 0


@pytest.mark.parametrize("keys", [{"limit": 5}, {"max_length": 12}, {"limit": 5, "seed": 1}, {"seed": 1}])
def test_other_keys_are_another_task(keys: dict[str, Any], models: Path, entry: Entry) -> None:
    measure([entry()], "x")
    assert measure([entry(**keys)], "x").made["known"] == 0


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"value": 1}', None])
def test_a_damaged_result_is_measured_again(damage: str | None, models: Path, entry: Entry) -> None:
    first = measure([entry()], "x")
    (kept,) = (file for file in Path("kept").glob("*.json") if file.name != "hashes.json")
    if damage is None:  # an item is gone
        document = json.loads(kept.read_text())
        document["predictions"].popitem()
        damage = json.dumps(document)
    kept.write_text(damage)
    Path("kept/hashes.json").write_text("[]")
    again = measure([entry()], "x")
    assert again.made["known"] == 0
    assert plain(again) == plain(first)
    assert measure([entry()], "x").made["known"] == 1


def test_a_folder_that_cannot_be_written(
    models: Path, entry: Entry, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and what is measured is the same."""
    whole = plain(measure([entry()], "x"))
    (models / "kept").rename(models / "gone")
    Path("kept").write_text("a file")
    caplog.clear()
    assert plain(measure([entry(), entry(name="again", limit=4)], "x"))[:1] == whole
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith("kept: no result is kept there: ")
    Path("suite.yaml").write_text(json.dumps({"tasks": [entry(limit=2)]}))
    Path("shut").write_text("a file")
    ran = cli("eval", "suite.yaml", "x", "--results", "shut/deep", "--out", "out", "-q")
    why = "no result is kept there: Not a directory (--results DIR names another folder)"
    assert (ran.code, ran.err) == (0, f"warning: shut/deep: {why}\n")


def test_killed_and_resumed(models: Path, entry: Entry) -> None:
    """After a kill -9 in the middle, the same command measures what is missing, and gives what one run gives."""
    tasks = [entry(name=f"t{number}", limit=3 + number) for number in range(9)]
    Path("suite.yaml").write_text(json.dumps({"tasks": tasks}))
    command = [sys.executable, "-m", "mergebench", "eval", "suite.yaml", "x", "y", "--out", "out", "-q"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(Path("results").glob("[!.h]*.json"))) < 4 and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = {file.name: file.stat().st_ino for file in Path("results").glob("[!.h]*.json")}
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    results = Results.load(Path("out"))
    assert results.made["known"] == len(before)
    assert {name: (Path("results") / name).stat().st_ino for name in before} == before  # else written anew
    anew = evaluate_models([Candidate(name, "input", open_model(name)) for name in "xy"], load_suite("suite.yaml"))
    assert plain(results) == plain(anew)
