"""The loop follows its settings: rates, batches, order, what is kept, on a small student whose loss takes notes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from trainable import classify

from mergebench.training import load_config
from mergebench.training.loop import fit
from mergebench.training.objective import Asked, Loss
from mergebench.training.once import Once, open_model
from mergebench.training.settings import Settings
from mergebench.training.student import Fit, Student

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


class Noted(Loss):
    """The task's loss, or from a step on the opposite; what it was asked."""

    def __init__(self, spoilt: float = math.inf) -> None:
        self.items: list[list[int]] = []
        self.logits = torch.empty(0)  # of the last batch
        self._spoilt = spoilt

    def __call__(self, asked: Asked) -> Tensor:
        """Of the batch."""
        self.items.append(list(asked.items))
        self.logits = asked.rows.logits.detach()
        loss = cross_entropy(asked.rows.logits, asked.rows.targets)
        return loss if len(self.items) <= self._spoilt else -100 * loss


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """On an encoder and labelled texts."""
    return classify(tmp_path_factory.mktemp("loop"), delta={"kind": "hut", "rank": 2})


def once(config: dict[str, Any], seed: int = 0, **more: Any) -> Once:
    loaded = load_config({**config, **more})
    (row,) = loaded.rows
    return Once(row, open_model(row.model), loaded, CPU, seed, row.lrs[0])


def fitted(
    config: dict[str, Any], place: Path, loss: Loss, *, lr: float = 0.01, seed: int = 0, **settings: Any
) -> tuple[Student, Fit]:
    student = once(config).student()
    given = Settings(**{"batch": 16, "max_steps": 6, **settings})
    return student, fit(student, loss, given, lr=lr, seed=seed, directory=place)


def rate(schedule: str, step: int, steps: int = 10, rising: int = 3) -> float:
    """The share of the learning rate at a step, from 0."""
    if step < rising:
        return step / rising
    done = (step - rising) / (steps - rising)
    return {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[schedule]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rates(config: dict[str, Any], tmp_path: Path, schedule: str) -> None:
    more = {"warmup": 0.25, "schedule": schedule, "head_lr": 0.5, "weight_decay": 0.125, "max_steps": 10}
    fitted(config, tmp_path, Noted(), lr=0.02, **more)

    (last,) = sorted(tmp_path.glob("checkpoint-10"))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    rates = [one["learning_rate"] for one in log if "learning_rate" in one]
    assert rates == pytest.approx([0.02 * rate(schedule, step) for step in range(10)])
    groups = torch.load(last / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["initial_lr"] for group in groups] == [0.02, 0.5]
    assert [group["weight_decay"] for group in groups] == [0.125, 0.125]


def test_gradients_are_cut_to_a_length(config: dict[str, Any], tmp_path: Path) -> None:
    """Below AdamW's epsilon nothing moves."""
    student, _ = fitted(config, tmp_path, Noted(), clip=1e-14, weight_decay=0.0)
    moved = [float(one.detach().abs().max()) for name, one in student.trained.items() if name.endswith("b")]
    assert moved and max(moved) < 1e-6


def test_batches_and_their_order(config: dict[str, Any], tmp_path: Path) -> None:
    """Every item once an epoch, in an order that epoch and seed decide."""
    orders = []
    for seed in (0, 0, 1):
        loss = Noted()
        more = {"batch": 8, "accumulate": 3, "max_steps": None, "epochs": 2, "bf16": seed == 1}
        _, made = fitted(config, tmp_path / str(len(orders)), loss, seed=seed, **more)
        assert made.steps == 2 * 96 / 8 / 3 and [len(one) for one in loss.items] == [8] * 24
        epochs = [[item for batch in loss.items[12 * n : 12 * n + 12] for item in batch] for n in range(2)]
        assert all(sorted(epoch) == list(range(96)) for epoch in epochs) and epochs[0] != epochs[1]
        assert torch.equal(loss.logits.bfloat16().float(), loss.logits) == (seed == 1)
        orders.append(epochs)
    assert orders[0] == orders[1] and orders[0][0] != orders[2][0]


def test_the_best_measurement_is_kept(config: dict[str, Any], tmp_path: Path) -> None:
    """The loss turns round after the third of ten steps."""
    how = {"head_lr": 0.5, "max_steps": 10, "every": 1, "warmup": 0.0, "schedule": "constant", "clip": 1e9}
    student, made = fitted(config, tmp_path, Noted(spoilt=3), lr=0.01, **how)
    scores = [point["validation"] for point in made.history if "validation" in point]
    assert len(scores) == 10 and scores[-1] < max(scores) == made.best
    assert student.measure("validation").score.value == max(scores)


def test_seeds_decide_what_starts_at_random_and_which_items_are_read(config: dict[str, Any]) -> None:
    task = {**config["task"], "limit": 20}
    runs = [once(config, seed, task=task) for seed in (0, 0, 1)]
    first, again, other = (run.student().attached.parameters for run in runs)
    names = [name for name in first if name.endswith(".a")]
    assert names and all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in names)
    drawn = [run.task.parts["train"] for run in runs]
    assert len(drawn[0]) == len(set(drawn[0])) == 20 and drawn[0] == drawn[1] != drawn[2]
    assert all(run.student().task is run.task for run in runs)


def test_the_penalty_moves_and_is_in_no_curve(config: dict[str, Any], tmp_path: Path) -> None:
    """Two runs from one start, with and without: the same first loss, other parameters."""
    found = []
    for weight in (0.0, 100.0):
        delta = {"kind": "adalora", "init_rank": 4, "target_rank": 2, "warmup": 0, "orthogonality": weight}
        student = once(config, delta=delta, max_steps=4).student()
        made = fit(student, Noted(), Settings(max_steps=1, warmup=0), lr=0.01, seed=0, directory=tmp_path / str(weight))
        found.append((made.history[0]["loss"], {n: one.detach().clone() for n, one in student.trained.items()}))
    (loss, without), (same, other) = found
    assert loss == same
    assert any(not torch.equal(without[name], other[name]) for name in without if "lora_A" in name)
