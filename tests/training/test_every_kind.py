"""What was trained is what `MODEL+DIRECTORY` folds to: the same logits, measured, merged, shown, converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainable import classify, complete

from mergebench.deltas.open import open_model
from mergebench.networks.network import Network
from mergebench.training import load_config, once, train
from mergebench.training.declared import kinds

PEFT = {
    "lora": {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"},
    "dora": {"peft_type": "LORA", "r": 2, "use_dora": True, "target_modules": "all-linear"},
    "ia3": {"peft_type": "IA3", "target_modules": ["query", "value"], "feedforward_modules": []},
}
WITHOUT = {"ladder"}  # not a change to the base's tensors
KINDS = [name for name in kinds.names() if name not in WITHOUT]


@pytest.mark.parametrize("name", [*KINDS, *PEFT])
def test_trained_is_folded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    students = []
    kept = once.fit
    monkeypatch.setattr(
        once, "fit", lambda student, *args, **more: students.append(student) or kept(student, *args, **more)
    )
    what = {"peft": PEFT[name]} if name in PEFT else {"delta": {"kind": name}}
    config = load_config(classify(tmp_path, **what))

    made = train(config, tmp_path / "out", device="cpu")

    (one,) = made.runs
    folded = Network(
        open_model(one["reference"].replace("OUT", str(tmp_path / "out"))), "AutoModel", torch.device("cpu")
    )
    (student,) = students
    task = config.rows[0].task
    items = list(range(24))
    with torch.no_grad():
        student.eval()
        trained = task.rows(student.network, student.head, "test", items).logits
        again = task.rows(folded, student.head, "test", items).logits
        before = task.rows(
            Network(open_model(str(tmp_path / "base")), "AutoModel", torch.device("cpu")), student.head, "test", items
        ).logits
    assert torch.allclose(trained, again, atol=1e-5, rtol=1e-5)
    assert name == "head" or not torch.allclose(before, again, atol=1e-5, rtol=0)
    assert one["history"][0]["loss"] > 0


def test_completions_are_learnt(tmp_path: Path, one_thread: None) -> None:
    what: dict[str, Any] = {"epochs": 12, "lr": 1e-2, "delta": "full"}

    made = train(load_config(complete(tmp_path, **what)), tmp_path / "out", device="cpu")

    losses = [point["validation_loss"] for point in made.runs[0]["history"] if "validation_loss" in point]
    assert min(losses) < 0.6 * losses[0]
    folded = Network(open_model(str(tmp_path / "out/full/seed-0")), "AutoModelForCausalLM", torch.device("cpu"))
    ids = folded.tokenizer("cab", return_tensors="pt")["input_ids"]
    assert folded.module(ids).logits.isfinite().all()
