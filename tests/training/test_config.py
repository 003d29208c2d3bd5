"""A training config is strict: every mistake is said before the first step, with its place and a way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainable import classify

from mergebench.errors import MergebenchError
from mergebench.training import load_config, train


def change(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def put(config: dict[str, Any]) -> None:
        inner = config
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to

    return put


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.pop(key)


READ = {
    "a key that is none": (change("epoch", to=1), "config: epoch: no such key", "did you mean 'epochs'?"),
    "no model": (drop("model"), "config: model: missing", "a path"),
    "no delta": (drop("delta"), "config: delta: missing", "hut"),
    "both": (change("peft", to={"peft_type": "LORA"}), "delta and peft: one of them", "delta: {kind"),
    "a kind that is none": (change("delta", to="hat"), "delta.kind: no kind of delta to train is called", "'hut'?"),
    "no kind": (change("delta", to={"rank": 3}), "config: delta.kind: missing", "hut"),
    "a kind's key": (change("delta", "rnk", to=3), "config: delta.rnk: 'hut' has no such key", "did you mean 'rank'?"),
    "a kind's value": (change("delta", "rank", to=0), "delta.rank: must be at least 1, got 0", "of the two factors"),
    "no task file": (change("task", "train", to="none.jsonl"), "task.train: no such file: none.jsonl", "looked for"),
    "a task that is none": (change("task", "kind", to="text"), "no kind of training task is called 'text'", ""),
    "an objective that is none": (change("objective", to="tusk"), "no objective is called 'tusk'", "'task'?"),
    "an lr of zero": (change("lr", to=0), "config: lr: must be above 0, got 0", "learning rate"),
    "the same seed twice": (change("seeds", to=[1, 1]), "config: seeds: the same twice, got [1, 1]", "a run each"),
    "no seeds": (change("seeds", to=[]), "config: seeds: must name one", "a run each"),
    "rows that are a list": (change("rows", to=[1]), "config: rows: must be a mapping of names, got [1]", "{NAME: "),
    "a row's name": (change("rows", to={"a/b": {}}), "a row's name becomes a directory's", "letters"),
    "a row's key": (change("rows", to={"a": {"epoch": 1}}), "config: rows.a.epoch: no such key", "'epochs'?"),
    "no peft_type": (change("rows", to={"a": {"peft": {"r": 3}}}), "rows.a.peft: names no peft_type", "LORA"),
}  # fmt: skip


@pytest.mark.parametrize("what", READ)
def test_a_mistake_is_said_with_its_place(what: str, tmp_path: Path) -> None:
    spoil, message, hint = READ[what]
    config = classify(tmp_path, delta={"kind": "hut"})
    spoil(config)

    with pytest.raises(MergebenchError) as error:
        load_config(config)

    assert message in error.value.message
    assert hint in (error.value.hint or "")


FITTED = {
    "targets that match nothing": ({"kind": "hut", "targets": ["*.q"]}, "targets: '*.q' names no tensor", "called"),
    "targets that are no matrix": ({"kind": "hut", "targets": ["*query.bias"]}, "[16] is no matrix", "matrices alone"),
    "a rank above the matrix": ({"kind": "hut", "rank": 17}, "rank: 17: ", "at most 16"),
}


@pytest.mark.parametrize("what", FITTED)
def test_what_does_not_fit_the_model_is_said_before_the_first_step(what: str, tmp_path: Path) -> None:
    delta, message, hint = FITTED[what]

    with pytest.raises(MergebenchError) as error:
        train(load_config(classify(tmp_path, delta=delta)), tmp_path / "out", device="cpu")

    assert message in error.value.message
    assert hint in (error.value.hint or "")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


PEFT = {
    "a type that is none": ({"peft_type": "LORE"}, "peft: peft_type: 'LORE' cannot be folded", "did you mean 'LORA'?"),
    "a setting that is none": ({"peft_type": "LORA", "rank": 3}, "peft: LORA has no 'rank'", ""),
    "modules that match nothing": ({"peft_type": "LORA", "target_modules": ["q"]}, "peft: LORA on ", ""),
}


@pytest.mark.parametrize("what", PEFT)
def test_what_peft_refuses_is_one_line(what: str, tmp_path: Path) -> None:
    peft, message, hint = PEFT[what]

    with pytest.raises(MergebenchError) as error:
        train(load_config(classify(tmp_path, peft=peft)), tmp_path / "out", device="cpu")

    assert message in error.value.message and "\n" not in error.value.message
    assert hint in (error.value.hint or "")


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_an_item_in_train_and_test_is_refused(tmp_path: Path) -> None:
    config = classify(tmp_path, delta="bias")
    Path(config["task"]["test"]).write_text(json.dumps(rows(config["task"]["train"])[3]) + "\n")

    with pytest.raises(MergebenchError, match=r"test\.jsonl:1: the same item is in train, .*train\.jsonl:4"):
        load_config(config)


def test_a_label_without_a_class_is_refused(tmp_path: Path) -> None:
    config = classify(tmp_path, delta="bias")
    Path(config["task"]["test"]).write_text('{"id": "new", "text": "w1", "label": "third"}\n')

    with pytest.raises(MergebenchError, match=r"test\.jsonl:1: label 'third' is none of the labels of .*train\.jsonl"):
        load_config(config)


def test_learning_rates_to_choose_from_need_validation_items(tmp_path: Path) -> None:
    config = classify(tmp_path, delta="bias", lr=[1e-3, 1e-2])
    del config["task"]["validation"]

    with pytest.raises(MergebenchError, match="config: lr: several, and no validation items to choose on"):
        load_config(config)
