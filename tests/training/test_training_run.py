"""A run of `mergebench train`: what it leaves, how it is gone on with, what stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from models import names
from safetensors.torch import load_file
from torch import nn
from trainable import classify

import mergebench
from mergebench.errors import MergebenchError, RunError
from mergebench.training import load_config, train
from mergebench.training.memory import saved_by_autograd

ONE = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def quick(one_thread: None) -> None:
    """On tiny models, threads only wait for one another."""


def test_what_a_run_leaves(tmp_path: Path) -> None:
    rows = {"hut": {"delta": "hut"}, "lora": {"peft": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}}}
    config = classify(tmp_path, rows=rows, seeds=[0, 1])

    made = train(load_config(config), tmp_path / "out", device="cpu")

    out = tmp_path / "out"
    assert names(out) == [
        "README.md", "curves.png", "hut", "lora", "mergebench.json", "results.json", "scores.png",
    ]  # fmt: skip
    assert names(out / "hut/seed-1") == [
        "delta.safetensors", "head.safetensors", "test-predictions.jsonl", "validation-predictions.jsonl",
    ]  # fmt: skip
    assert {"adapter_config.json", "adapter_model.safetensors", "head.safetensors"} <= set(names(out / "lora/seed-0"))
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [(run["row"], run["seed"]) for run in runs] == [("hut", 0), ("hut", 1), ("lora", 0), ("lora", 1)]
    for run in runs:
        predictions = map(json.loads, (out / run["directory"] / "test-predictions.jsonl").read_text().splitlines())
        right = [one["gold"] == one["pred"] for one in predictions]
        assert run["test"]["value"] == pytest.approx(np.mean(right))
    values = [100 * run["test"]["value"] for run in runs[:2]]
    error = np.std(values, ddof=1) / np.sqrt(2)
    assert f"| hut | {''}" in made.table()
    assert f"{np.mean(values):.1f} ± {error:.1f}" in made.table()


def test_all_weights_of_a_base_named_from_the_configs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = classify(tmp_path, delta="full") | {"model": "base"}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    train(load_config(tmp_path / "train.yaml"), tmp_path / "out", device="cpu")

    assert (
        load_file(tmp_path / "out/full/seed-0/model.safetensors").keys()
        == load_file(tmp_path / "base/model.safetensors").keys()
    )


def test_what_no_backward_pass_reaches_keeps_nothing_alive() -> None:
    module = nn.Linear(3, 3)
    with saved_by_autograd(module) as count:
        hidden = module(torch.ones(2, 3)).exp()
        hidden.tanh()  # as a pooler that no loss reads
        loss = hidden.sum()
    loss.backward()

    kept = weakref.ref(hidden), weakref.ref(module.weight)
    del hidden, loss, module
    assert [one() for one in kept] == [None, None]
    assert count.bytes == 2 * 3 * 4 * 3  # the input, exp's output, tanh's


def test_a_suite_measures_what_training_measured(tmp_path: Path) -> None:
    config = classify(tmp_path, delta="hut")
    (run,) = train(load_config(config), tmp_path / "out", device="cpu").runs
    head = tmp_path / "out" / run["directory"] / "head.safetensors"
    task = {"name": "a", "kind": "text-classification", "data": config["task"]["test"], "head": str(head)}

    suite = mergebench.evaluation.load_suite({"tasks": [task]})
    model = run["reference"].replace("OUT", str(tmp_path / "out"))
    (record,) = mergebench.measure(suite, [model], device="cpu", results=tmp_path / "results").records

    assert record.value == run["test"]["value"]


def test_one_seed_gives_one_result(tmp_path: Path) -> None:
    config = load_config(classify(tmp_path, peft={"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}))

    for name in ("one", "other"):
        train(config, tmp_path / name, device="cpu")

    files = [tmp_path / name / "lora/seed-0/adapter_model.safetensors" for name in ("one", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_a_finished_run_that_is_damaged_is_trained_again(tmp_path: Path) -> None:
    config = load_config(classify(tmp_path, delta="bias", seeds=[0, 1], max_steps=2))
    whole = train(config, tmp_path / "whole", device="cpu")

    def stop(what: str, done: int, total: int) -> None:
        if what.endswith("seed-1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "out", device="cpu", progress=stop)
    (tmp_path / ".out.partial/bias/seed-0/delta.safetensors").unlink()
    again = train(config, tmp_path / "out", device="cpu", resume=True)

    for run in again.runs:
        one, other = (tmp_path / name / run["directory"] / "delta.safetensors" for name in ("whole", "out"))
        assert one.read_bytes() == other.read_bytes()
    assert [run["test"] for run in again.runs] == [run["test"] for run in whole.runs]
    assert train(config, tmp_path / "out", device="cpu", resume=True).already_done
    Path(config.data["task"]["test"]).write_text('{"id": "new", "text": "w1 w2", "label": "first"}\n')
    with pytest.raises(MergebenchError, match="out"):  # the data are others: this is not what is there
        train(load_config(config.data), tmp_path / "out", device="cpu", resume=True)


def test_of_several_learning_rates_the_best_on_validation_is_kept(tmp_path: Path) -> None:
    config = load_config(classify(tmp_path, delta="hut", lr=[1e-6, 1e-2], seeds=[0, 1], epochs=2, head_lr=1e-6))

    made = train(config, tmp_path / "out", device="cpu")

    tried = {run["lr"]: run["chosen_by"] for run in [*made.provenance["tried"], made.runs[0]]}
    best = max(tried, key=lambda lr: (tried[lr], -[1e-6, 1e-2].index(lr)))
    assert [run["lr"] for run in made.runs] == [best, best]
    assert names(tmp_path / "out/hut") == ["seed-0", "seed-1"]
    assert (tmp_path / "out/hut/seed-0/delta.safetensors").is_file()


def test_a_loss_that_is_not_finite_stops_with_step_and_items(tmp_path: Path) -> None:
    config = classify(tmp_path, delta="full", lr=1e30, clip=1e30, warmup=0)

    with pytest.raises(RunError, match=r"step \d+: the loss is not finite; the batch's items: train-\d+, ") as error:
        train(load_config(config), tmp_path / "out", device="cpu")

    assert "give a smaller lr than 1e+30" in str(error.value.hint)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    config = classify(tmp_path, delta="hut", epochs=2, seeds=[0, 1], every=3)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    train(load_config(tmp_path / "train.yaml"), tmp_path / "whole", device="cpu")

    command = [sys.executable, "-m", "mergebench", "train", "train.yaml", "--out", "killed", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, env=ONE)
    checkpoints = tmp_path / ".killed.partial" / ".training" / "hut" / "seed-1" / "fit"
    ended = time.monotonic() + 300
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < ended
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = tmp_path / ".killed.partial" / "hut" / "seed-0" / "delta.safetensors"
    written = kept.stat().st_mtime_ns
    done = subprocess.run([*command, "--resume"], cwd=tmp_path, env=ONE, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed/hut/seed-0/delta.safetensors").stat().st_mtime_ns == written
    for seed in (0, 1):
        one, other = (load_file(tmp_path / name / f"hut/seed-{seed}/delta.safetensors") for name in ("whole", "killed"))
        assert all(torch.equal(one[name], other[name]) for name in one)
    saved = [
        [run["saved_by_autograd"] for run in json.loads((tmp_path / name / "results.json").read_text())["runs"]]
        for name in ("whole", "killed")
    ]
    assert saved[0] == saved[1] and min(saved[0]) > 0  # of the first step, which an earlier process made
    again = subprocess.run([*command, "--resume"], cwd=tmp_path, env=ONE, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "already finished, nothing to resume" in again.stderr


def test_the_command_prints_the_table_and_what_to_name(tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hut.yaml").write_text(yaml.safe_dump(classify(tmp_path, delta="hut")))

    ran = cli("train", "hut.yaml", "--device", "cpu")

    assert ran.code == 0
    assert ran.out.splitlines()[-1] == f"{tmp_path / 'base'}+trained/hut/hut/seed-0"
    assert "wrote trained/hut in" in ran.err
    assert cli("train", "hut.yaml", "--device", "cpu").code == 2
    document = json.loads(cli("train", "hut.yaml", "--resume", "--json").out)
    assert document["runs"][0]["directory"] == "hut/seed-0"


@pytest.mark.slow
def test_two_processes_train_one_adapter(tmp_path: Path) -> None:
    """Half a batch each, its gradients averaged: the loss curve of one process with whole batches, up to dropout."""
    config = classify(tmp_path, delta="hut", epochs=2, batch=16)
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**config, "batch": 8}))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    found = []
    for name, command in (("one", [sys.executable, "-m"]), ("two", launch)):
        done = subprocess.run(
            [*command, "mergebench", "train", f"{name}.yaml", "--out", name, "--device", "cpu", "--quiet"],
            cwd=tmp_path, env=ONE, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / name / "results.json").read_text())["runs"][0])
    assert found[0]["steps"] == found[1]["steps"] == 12
    losses = [[point["loss"] for point in run["history"] if "loss" in point] for run in found]
    assert np.allclose(*losses, atol=0.1)
