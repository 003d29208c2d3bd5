"""LiST's adapters and its self-training: the fold by hand, meta weights against per-item gradients, sessions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from mergebench.errors import MergebenchError
from mergebench.systems import list_
from mergebench.systems.list_ import divergence, meta_weights
from mergebench.training import load_config, once, train
from mergebench.training.student import Student
from tests.encoders import write_encoder
from tests.training.trainable import base_of, classify, write_labelled

ADAPTER = {"kind": "list", "bottleneck": 4}


@pytest.fixture(autouse=True)
def quick(one_thread: None) -> None:
    """On tiny models, threads only wait for one another."""


def test_meta_weights_by_hand() -> None:
    """Per-item gradients (1, 0), (-1, 0), (0, 2) and (1, 1): inner products 1, -1, 2."""
    theta = torch.zeros(2, requires_grad=True)
    losses = torch.stack([theta[0], -theta[0], 2 * theta[1]])

    weights = meta_weights(theta.sum(), losses, [theta])

    assert torch.allclose(weights, torch.tensor([1 / 3, 0, 2 / 3]))
    assert torch.equal(meta_weights(theta.sum(), -losses.abs() * 0 + losses * 0, [theta]), torch.zeros(3))


def test_meta_weights_are_those_of_per_item_gradients() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    x, q = torch.randn(11, 5), torch.randn(11, 3).softmax(1)
    labelled, targets = torch.randn(4, 5), torch.tensor([0, 2, 1, 1])
    parameters = list(layer.parameters())

    weights = meta_weights(cross_entropy(layer(labelled), targets), divergence(q, layer(x)), parameters)

    meta = torch.cat([g.flatten() for g in torch.autograd.grad(cross_entropy(layer(labelled), targets), parameters)])
    expected = []
    for one, soft in zip(x, q, strict=True):
        loss = torch.nn.functional.kl_div(layer(one).log_softmax(0), soft, reduction="sum")
        expected.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) @ meta)
    products = torch.stack(expected).clamp(min=0)
    assert torch.allclose(weights, products / products.sum(), atol=1e-6)
    assert (weights == 0).any() and weights.sum().item() == pytest.approx(1)


def test_it_folds_into_the_layer_before_it(tmp_path: Path) -> None:
    """T = I + A2 A1, W' = T W and b' = T b, by the numbers in the saved file."""
    made = train(load_config(classify(tmp_path, delta=ADAPTER)), tmp_path / "out", device="cpu")

    saved = load_file(tmp_path / "out/list/seed-0/delta.safetensors")
    about = json.loads(_metadata(tmp_path / "out/list/seed-0/delta.safetensors")["delta"])["tensors"]
    assert len(about) == 2 * 2 * 2  # a weight and a bias behind attention and MLP, in two layers
    layer = "encoder.layer.0.output.dense"
    parts = about[f"{layer}.weight"]["parts"]
    assert parts == about[f"{layer}.bias"]["parts"]  # stored once
    t = torch.eye(16) + saved[parts["b"]] @ saved[parts["a"]]
    from mergebench.checkpoint.files import Files
    from mergebench.deltas.open import open_model

    base = load_file(tmp_path / "base/model.safetensors")
    folded = open_model(made.runs[0]["reference"].replace("OUT", str(tmp_path / "out")))
    with Files() as files:
        values = folded.values(files)
        assert torch.allclose(values.whole(f"{layer}.weight"), t @ base[f"{layer}.weight"], atol=1e-5)
        assert torch.allclose(values.whole(f"{layer}.bias").view(-1), t @ base[f"{layer}.bias"], atol=1e-5)


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def config(folder: Path, **more: Any) -> dict[str, Any]:
    made = classify(folder, delta=ADAPTER)
    write_labelled(folder / "more.jsonl", 64, 9, "more")
    made["task"] |= {"per_class": 8}
    settings = {"unlabelled": str(folder / "more.jsonl"), "sessions": 2, "steps": 6, **more}
    return made | {"objective": {"self-training": settings}, "batch": 8}


@pytest.mark.parametrize("weights", ["meta", "uniform"])
def test_sessions(weights: str, tmp_path: Path) -> None:
    made = train(load_config(config(tmp_path, weights=weights, noise=0.5)), tmp_path / "out", device="cpu")

    (run,) = made.runs
    sessions = run["about"]["sessions"]
    assert [one["session"] for one in sessions] == [0, 1, 2]
    assert run["validation"]["value"] == sessions[-1]["validation"]
    assert ("weight_of_replaced" in sessions[1]) == (weights == "meta")


def test_what_each_session_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new student on the last one's soft labels, then on the labels; items are weighed after .6 of the steps."""
    fits: list[dict[str, Any]] = []
    kept = once.fit

    def noted(student: Student, loss: Any, *more: Any, **named: Any) -> Any:
        start = {name: one.detach().clone() for name, one in student.trained.items()}
        made = kept(student, loss, *more, **named)
        task: Any = student.task
        with torch.no_grad():  # on the unlabelled items, after this training
            student.eval()
            rows = [unlabelled.rows(student.network, student.head, "train", [at]).logits for at in range(64)]
        fits.append({"network": student.network, "start": start, "loss": loss, "task": task, "made": made})
        fits[-1]["says"] = torch.cat(rows).softmax(1)
        return made

    monkeypatch.setattr(once, "fit", noted)
    loaded = load_config(config(tmp_path))
    unlabelled = list_._Unlabelled(loaded.rows[0].task, tmp_path / "more.jsonl")  # type: ignore[arg-type]
    train(loaded, tmp_path / "out", device="cpu")

    labels, *sessions = fits
    assert len(sessions) == 4 and labels["made"].steps == 2  # of 16 items in batches of 8
    teacher, orders = labels, []
    for soft, last in (sessions[:2], sessions[2:]):
        torch.testing.assert_close(soft["loss"]._soft, teacher["says"], rtol=1e-4, atol=1e-5)
        assert soft["network"] is last["network"] is not teacher["network"]
        assert all(torch.equal(one, labels["start"][name]) for name, one in soft["start"].items())
        assert any(not torch.equal(one, labels["start"][name]) for name, one in last["start"].items())
        assert soft["made"].steps == 6 and last["made"].steps == 2
        assert len(soft["task"].parts["train"]) == 64 and len(last["task"].parts["train"]) == 16
        assert len(soft["loss"].seen) == 3 * 8
        orders.append(soft["loss"]._random.random())
        teacher = last
    assert orders[0] != orders[1]


def test_the_adapters_begin_small(tmp_path: Path) -> None:
    base = base_of(write_encoder(tmp_path / "base"))
    values = torch.cat(
        [one.detach().flatten() for one in list_.list_adapters(base, list_.Params()).parameters.values()]
    )
    assert float(values.std()) == pytest.approx(0.02, rel=0.05)


def test_the_labelled_items_are_drawn_with_the_seed(tmp_path: Path) -> None:
    task = load_config(config(tmp_path)).rows[0].task

    drawn = [task.drawn(seed).parts["train"] for seed in (0, 0, 1)]

    assert drawn[0] == drawn[1] != drawn[2]
    labels = task.drawn(1).gold("train")
    assert sorted(labels) == ["first"] * 8 + ["second"] * 8


def test_too_few_of_a_label(tmp_path: Path) -> None:
    made = config(tmp_path)
    made["task"]["per_class"] = 90

    with pytest.raises(MergebenchError, match=r"items of label '\w+'") as error:
        load_config(made)

    assert "at most" in str(error.value.hint)
