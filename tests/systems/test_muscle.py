"""MUSCLE: its loss by hand and by its identities, what a run says of flips, what starts as what, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Generator, Tensor

from mergebench.checkpoint.files import read_tensors
from mergebench.checkpoint.header import read_header
from mergebench.errors import MergebenchError
from mergebench.evaluation.compare.comparison import compare
from mergebench.systems import muscle
from mergebench.systems.muscle import Params, divergence, loss, mask
from mergebench.training import load_config, once, train
from mergebench.training.task import Rows
from tests.encoders import write_encoder
from tests.training.trainable import classify, complete

PEFT = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}


def params(**more: Any) -> Params:
    return Params(old="old", new="new", **more)


def rows(seed: int = 0, count: int = 12) -> tuple[Rows, Tensor, Tensor]:
    random = Generator().manual_seed(seed)
    student, old, new = torch.randn(3, count, 3, generator=random)
    targets = torch.randint(3, (count,), generator=random)
    return Rows(student.requires_grad_(), targets, torch.arange(count) // 3), old, new


def test_golden() -> None:
    student = torch.tensor([[0.0, 0, 1]])
    for teacher in ([2.0, 0, 0], [0.0, 2, 0]):
        assert divergence(torch.tensor([teacher]), student, 2.0).item() == pytest.approx(0.2130783, abs=1e-6)


def test_the_loss_is_the_papers_row_by_row() -> None:
    student, old, new = rows()
    total = 0.0
    for z, y, z1, z2 in zip(student.logits.detach(), student.targets, old, new, strict=True):
        teacher = z1 if z.argmax() != y else z2
        p, q = torch.softmax(teacher / 2, 0), torch.softmax(z / 2, 0)
        total += float((p * (p.log() - q.log())).sum()) / len(old)
    assert loss(student, old, new, params()).item() == pytest.approx(total, rel=1e-5)
    task = torch.nn.functional.cross_entropy(student.logits, student.targets).item()
    assert loss(student, old, new, params(task=0.25)).item() == pytest.approx(0.75 * total + 0.25 * task, rel=1e-5)


def test_masks() -> None:
    student, old, _ = rows()
    right, before = (one.argmax(1) == student.targets for one in (student.logits, old))
    assert torch.equal(mask(student, old, "muscle"), ~right)
    assert torch.equal(mask(student, old, "old-right"), before)
    assert mask(student, old, "old").all()
    ours, theirs = (one.log_softmax(1)[torch.arange(12), student.targets].detach() for one in (student.logits, old))
    assert torch.equal(mask(student, old, "likelihood-token"), ours < theirs)
    whole = [bool(ours[3 * n : 3 * n + 3].sum() < theirs[3 * n : 3 * n + 3].sum()) for n in range(4)]
    assert mask(student, old, "likelihood-sequence").tolist() == [one for one in whole for _ in range(3)]
    assert any(whole) and not all(whole)


def test_identities() -> None:
    student, old, new = rows()
    same = student.logits.detach()
    assert loss(student, same, same, params()).item() == pytest.approx(0, abs=1e-6)
    right = Rows(student.logits, same.argmax(1), student.items)  # never wrong: distillation from the new model
    assert torch.equal(loss(right, old, new, params()), divergence(new, student.logits, 2.0).mean())
    assert torch.equal(loss(student, old, new, params(mask="old")), divergence(old, student.logits, 2.0).mean())


@pytest.mark.parametrize("name", muscle.MASKS)
def test_teachers_get_no_gradient(name: str) -> None:
    student, old, new = rows()
    old.requires_grad_(), new.requires_grad_()
    loss(student, old, new, params(mask=name, task=0.5)).backward()
    assert old.grad is None and new.grad is None and student.logits.grad is not None


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An old and a new base, and an adapter on each."""
    folder = tmp_path_factory.mktemp("muscle")
    written = classify(folder, lr=0.02, peft=PEFT)
    write_encoder(folder / "successor", seed=1)
    for name, base in (("old", "base"), ("new", "successor")):
        train(load_config({**written, "model": str(folder / base)}), folder / name, device="cpu")
    (folder / "config.json").write_text(json.dumps({key: one for key, one in written.items() if key != "peft"}))
    return folder


@pytest.fixture
def updated(home: Path, one_thread: None) -> dict[str, Any]:
    """A config that goes from the one to the other."""
    models = {"old": f"{home}/base+{home}/old/lora/seed-0", "new": f"{home}/successor+{home}/new/lora/seed-0"}
    written = json.loads((home / "config.json").read_text())
    return {**written, "model": str(home / "successor"), "objective": {"compatible": models}}


def test_a_run(updated: dict[str, Any], home: Path, tmp_path: Path) -> None:
    new = home / "new/lora/seed-0"
    config = load_config({**updated, "peft": PEFT, "from": str(new)})
    (start,) = config.rows
    student = once.Once(start, once.open_model(start.model), config, torch.device("cpu"), 0, 0.02).student()
    begun = load_file(new / "head.safetensors")
    assert torch.equal(student.head["weight"], begun["weight"])
    test = new / "test-predictions.jsonl"
    assert [one.output for one in student.measure("test").score.predictions.values()] == [
        json.loads(line)["pred"] for line in test.read_text().splitlines()
    ]

    (run,) = train(config, tmp_path / "out", device="cpu").runs

    old = home / "old/lora/seed-0/test-predictions.jsonl"
    flips = run["about"]["flips"]
    for name, file in (("new", test), ("student", tmp_path / "out/lora/seed-0/test-predictions.jsonl")):
        (pair,) = compare(old, file).pairs
        assert flips[name] == json.loads(json.dumps(pair.flips.to_dict()))
    assert flips["new"]["nfr_expected"] is not None
    assert not torch.equal(load_file(tmp_path / "out/lora/seed-0/head.safetensors")["weight"], begun["weight"])


def test_a_kind_of_ours_goes_on_from_a_run(tmp_path: Path, one_thread: None) -> None:
    written = classify(tmp_path, delta={"kind": "hut", "rank": 2})
    train(load_config(written), tmp_path / "first", device="cpu")
    place = tmp_path / "first/hut/seed-0"
    config = load_config({**written, "from": str(place), "max_steps": 1, "lr": 1e-9, "head_lr": 1e-9})
    train(config, tmp_path / "second", device="cpu")
    first, second = (
        read_tensors(read_header(one / "delta.safetensors")) for one in (place, tmp_path / "second/hut/seed-0")
    )
    assert all(torch.allclose(second[name], values, atol=1e-6) for name, values in first.items())
    for change, message in (
        ({"rank": 3}, "it holds no such multiplicative"),
        ({"targets": ["*query.weight"]}, "not in both"),
    ):
        other = {**written, "delta": {"kind": "hut", "rank": 2, **change}, "from": str(place)}
        with pytest.raises(MergebenchError, match=message) as error:
            train(load_config(other), tmp_path / "third", device="cpu")
        assert error.value.hint == "continue with the kind and settings that the run was trained with"
    values = (place / "delta.safetensors").read_bytes()
    (place / "delta.safetensors").write_bytes(values[:-1] + bytes([values[-1] ^ 1]))
    with pytest.raises(MergebenchError, match="second"):  # it went on from other values: it is not finished
        train(config, tmp_path / "second", device="cpu", resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft": {**PEFT, "r": 2}}, "its r is 4, here it is 2"),
        ({"peft": {**PEFT, "lora_alpha": 3}}, "its lora_alpha is 8, here it is 3"),
        ({"delta": "full"}, "this kind starts as its base is"),
        ({"delta": "hut"}, "what was trained there is no file of deltas"),
        ({"peft": PEFT, "from": "nowhere"}, "no such folder: nowhere"),
        ({"peft": PEFT, "from": 3}, "must be a path, got 3"),
    ],
)
def test_what_cannot_be_gone_on_from(
    updated: dict[str, Any], home: Path, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(MergebenchError, match=message):
        train(load_config({**updated, "from": str(home / "new/lora/seed-0"), **change}), tmp_path / "out")


def test_teachers_of_another_task(updated: dict[str, Any], home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    lines = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()]
    other.write_text("".join(json.dumps(one | {"label": one["label"].upper()}) + "\n" for one in lines))
    task = {"kind": "text-classification", "train": str(other), "max_length": 16}
    with pytest.raises(MergebenchError, match="its labels are first, second; the task's are FIRST, SECOND"):
        train(load_config({**updated, "peft": PEFT, "task": task}), tmp_path / "out", device="cpu")
    longer = {**updated["task"], "max_length": 12}
    with pytest.raises(MergebenchError, match="trained on other features"):
        train(load_config({**updated, "peft": PEFT, "task": longer}), tmp_path / "out", device="cpu")
    bare = {"compatible": {"old": str(home / "base"), "new": str(home / "base")}}
    with pytest.raises(MergebenchError, match=r"head\.safetensors"):
        train(load_config({**updated, "peft": PEFT, "objective": bare}), tmp_path / "out", device="cpu")


def test_a_teacher_with_another_tokenizer(updated: dict[str, Any], home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "base", tmp_path / "base")
    file = tmp_path / "base/tokenizer.json"
    written = json.loads(file.read_text())
    vocabulary = written["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    file.write_text(json.dumps(written))
    old = f"{tmp_path}/base+{home}/old/lora/seed-0"
    objective = {"compatible": {**updated["objective"]["compatible"], "old": old}}
    with pytest.raises(MergebenchError, match="another tokenizer"):
        train(load_config({**updated, "peft": PEFT, "objective": objective}), tmp_path / "out", device="cpu")


def test_language_models_teach_with_their_own_heads(tmp_path: Path, one_thread: None) -> None:
    written = complete(tmp_path, delta="hut")
    base = str(tmp_path / "base")
    objective = {"compatible": {"old": base, "new": base, "mask": "likelihood-sequence"}}
    (run,) = train(load_config({**written, "objective": objective}), tmp_path / "out", device="cpu").runs
    assert run["history"][0]["loss"] == pytest.approx(0, abs=1e-4)
    assert run["about"]["flips"]["new"]["nfr"] == 0
