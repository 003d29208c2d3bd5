"""PELA trained: the decomposition at the start, the factored pass, the terms of the loss, and what is saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import write_encoder
from models import read_model, tiny_tensors, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergebench
from mergebench.deltas.open import open_model
from mergebench.errors import MergebenchError
from mergebench.networks.network import Network
from mergebench.systems.pela import compress, expand
from mergebench.systems.pela.distil import Params as Terms
from mergebench.systems.pela.distil import distil, feature_loss, perturbation_loss
from mergebench.systems.pela.layers import rank_of
from mergebench.systems.pela.training import Factored, Factors, Params, pela
from mergebench.training import load_config, train
from mergebench.training.objective import Asked, Loss, Setup
from mergebench.training.student import Student
from tests.training.trainable import base_of, classify

IDS = torch.tensor([[2, 5, 9, 11, 3], [2, 7, 7, 30, 3]])


def write_gpt2(directory: Path) -> None:
    """A model whose linear layers are stored [in, out]."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    GPT2Model(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)).save_pretrained(directory)


def factored(directory: Path, **settings: Any) -> tuple[Network, Factored]:
    base = base_of(directory)
    attached = pela(base, Params(**settings))
    assert isinstance(attached, Factored)
    return base.network, attached


def test_eckart_young(tmp_path: Path) -> None:
    """The lost squares are those of the singular values that were cut."""
    _, attached = factored(write_encoder(tmp_path / "base"), ratio=2)
    for name, (outer, inner, dense) in attached.factors.items():
        rank = rank_of((len(dense), dense.shape[1]), 2)
        assert outer.shape == (len(dense), rank) and inner.shape == (rank, dense.shape[1]), name
        with torch.no_grad():
            lost = float((dense.double() - outer.double() @ inner.double()).square().sum())
        expected = float(torch.linalg.svdvals(dense.double())[rank:].square().sum())
        assert lost == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("start", ["svd", "random"])
def test_the_factored_pass_is_the_products(tmp_path: Path, family: str, start: str) -> None:
    write_encoder(tmp_path / "base") if family == "bert" else write_gpt2(tmp_path / "base")
    network, attached = factored(tmp_path / "base", start=start)
    plain = base_of(tmp_path / "base").network
    for name, one in attached.factors.items():
        weight = getattr(*plain.places[name][0])
        product = (one.outer @ one.inner).detach()
        weight.copy_(product.T if family == "gpt2" else product)

    ours, dense = (each.module(IDS).last_hidden_state for each in (network, plain))

    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    trained = [one for name, one in attached.parameters.items() if "pooler" not in name]
    assert trained and all(one.grad is not None for one in trained)
    weight = getattr(*network.places[next(iter(attached.factors))][0])  # whoever reads it gets the product
    torch.testing.assert_close(weight, getattr(*plain.places[next(iter(attached.factors))][0]))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_compressed_model_on_its_base(tmp_path: Path, family: str) -> None:
    """BASE+DIR is what `compress expand` writes, of a model and of a trained one."""
    write_encoder(tmp_path / "base") if family == "bert" else write_gpt2(tmp_path / "base")
    compress(str(tmp_path / "base"), tmp_path / "small", ratio=2)
    _, attached = factored(tmp_path / "base", start="random")
    with torch.no_grad():
        for one in attached.parameters.values():
            one.add_(0.1)
    (tmp_path / "trained").mkdir()
    attached.save(tmp_path / "trained")

    for name in ("small", "trained"):
        expected = read_model(expand(tmp_path / name, tmp_path / f"{name}-dense").out)
        found = open_model(f"{tmp_path / 'base'}+{tmp_path / name}").state_dict()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    assert len(read_model(tmp_path / "trained")) > len(expected)


def test_a_compressed_task_vector_on_its_base(tmp_path: Path) -> None:
    tensors = {name: one for name, one in tiny_tensors().items() if one.is_floating_point()}
    random = torch.Generator().manual_seed(3)
    wide = tensors | {f"layers.{i}.weight": torch.randn(24, 24, generator=random) for i in range(2)}
    write_model(tmp_path / "base", wide)
    tuned = {name: one + 0.1 * torch.randn(one.shape, generator=random) for name, one in wide.items()}
    write_model(tmp_path / "tuned", tuned)
    vector = mergebench.task_vector(str(tmp_path / "tuned"), str(tmp_path / "base"), tmp_path / "vector").out
    compress(str(vector), tmp_path / "small", ratio=1)
    back = expand(tmp_path / "small", tmp_path / "back").out

    found = open_model(f"{tmp_path / 'base'}+{tmp_path / 'small'}").state_dict()

    expected = open_model(f"{tmp_path / 'base'}+{back}").state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_another_base_is_refused(tmp_path: Path) -> None:
    compress(str(write_encoder(tmp_path / "base")), tmp_path / "small", ratio=2)
    write_gpt2(tmp_path / "other")
    with pytest.raises(MergebenchError, match="has no such weight"):
        open_model(f"{tmp_path / 'other'}+{tmp_path / 'small'}")
    write_encoder(tmp_path / "second", seed=1)
    assert "made on another model" in open_model(f"{tmp_path / 'second'}+{tmp_path / 'small'}").remarks[0]


# -- the terms ----------------------------------------------------------------------------------------------


def test_features_by_hand() -> None:
    """Two blocks, two texts of three and two tokens: padding counts for nothing."""
    random = torch.Generator().manual_seed(0)
    mine, theirs = ([torch.randn(2, 3, 4, generator=random) for _ in range(2)] for _ in range(2))
    lengths = (3, 2)
    expected = 0.0
    for a, b in zip(mine, theirs, strict=True):
        squares = [
            float((a[text, token, i] - b[text, token, i]) ** 2)
            for text in range(2)
            for token in range(lengths[text])
            for i in range(4)
        ]
        expected += sum(squares) / len(squares) / 2
    real = torch.tensor([[True, True, True], [True, True, False]])
    assert float(feature_loss(mine, theirs, real)) == pytest.approx(expected, rel=1e-5)
    whole = sum(float((a - b).square().mean()) for a, b in zip(mine, theirs, strict=True)) / 2
    assert float(feature_loss(mine, theirs, None)) == pytest.approx(whole, rel=1e-5)


def test_perturbation_by_hand() -> None:
    """Epsilon is a target from both sides; the gradient touches one element of each matrix."""
    dense = torch.zeros(2, 3)
    outer, inner = (
        torch.nn.Parameter(torch.tensor([[1.0], [0.0]])),
        torch.nn.Parameter(torch.tensor([[0.3, -0.5, 0.1]])),
    )
    loss = perturbation_loss([Factors(outer, inner, dense), Factors(outer, inner * 0, dense)], 0.1)  # type: ignore[arg-type]
    assert float(loss.detach()) == pytest.approx(((0.5 - 0.1) ** 2 + (0 - 0.1) ** 2) / 2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert inner.grad is not None
    assert torch.allclose(inner.grad, torch.tensor([[0.0, -0.4, 0.0]]))


def student_of(folder: Path, **terms: Any) -> tuple[Student, Loss, Network]:
    """A student with dropout off, its loss, and the teacher."""
    config = load_config(classify(folder, delta="pela"))
    base = base_of(folder / "base")
    student = Student(base.network, pela(base, Params()), config.rows[0].task)
    teachers: list[Network] = []

    def open_other(reference: str) -> Network:
        teachers.append(Network(open_model(reference), "AutoModel", torch.device("cpu")))
        return teachers[-1]

    setup = Setup(base.model, base.network, student.task, 0, open_other, lambda _: {}, student.attached)
    loss = distil(setup, Terms(teacher=str(folder / "base"), **terms))
    assert isinstance(loss, Loss)
    return student.eval(), loss, teachers[0]


def value_of(student: Student, loss: Loss, items: list[int]) -> Tensor:
    loss.before(student)
    return loss(Asked(student(torch.tensor(items)), items, student))


def test_each_term(tmp_path: Path) -> None:
    """Against passes of single texts, which have no padding."""
    student, _, teacher = student_of(tmp_path)
    items = [0, 1, 2]
    task: Any = student.task
    tokens = task._inputs(student.network, "train").tokens(student.network)
    squares = torch.zeros(2)
    count = 0
    for item in items:
        ids = torch.tensor([tokens[item]])
        ours, theirs = (
            each.module(input_ids=ids, output_hidden_states=True).hidden_states[1:]
            for each in (student.network, teacher)
        )
        squares += torch.stack([(a - b).square().sum() for a, b in zip(ours, theirs, strict=True)]).detach()
        count += ids.numel() * 16
    attached = student.attached
    assert isinstance(attached, Factored)
    largest = [float((one.outer @ one.inner - one.dense).detach().abs().max()) for one in attached.factors.values()]
    expected = {
        "features": float(squares.mean()) / count,
        "perturbation": sum((one - 0.001) ** 2 for one in largest) / len(largest),
        "task": float(torch.tensor(2.0).log()),  # the head starts at zero
    }
    off = {"features": 0.0, "perturbation": 0.0, "task": 0.0}
    for name, value in expected.items():
        student, loss, _ = student_of(tmp_path, **{**off, name: 2.0})
        assert value_of(student, loss, items).item() == pytest.approx(2 * value, rel=1e-4), name


def test_the_teacher_gets_no_gradient(tmp_path: Path) -> None:
    student, loss, teacher = student_of(tmp_path, perturbation=1.0)
    before = {name: one.clone() for name, one in teacher.module.state_dict().items()}

    for _ in range(2):  # hooks do not pile up
        value_of(student, loss, [0, 1]).backward()  # type: ignore[no-untyped-call]

    assert all(one.grad is None and not one.requires_grad for one in teacher.module.parameters())
    assert all(torch.equal(one, before[name]) for name, one in teacher.module.state_dict().items())
    attached = student.attached
    assert isinstance(attached, Factored)
    assert all(one.inner.grad is not None for name, one in attached.factors.items() if "pooler" not in name)
    assert not any(block._forward_hooks for each in (student.network, teacher) for block in each.blocks.values())


def test_logits_of_a_teacher_with_a_head(tmp_path: Path, one_thread: None) -> None:
    """A trained model teaches a copy of itself: the term is zero where the student is the teacher."""
    config = classify(tmp_path)
    dense = train(load_config({**config, "delta": "full"}), tmp_path / "dense", device="cpu")
    place = tmp_path / "dense/full/seed-0"
    terms = {"teacher": str(place), "features": 0, "logits": 1.0, "task": 0, "head": str(place / "head.safetensors")}
    with pytest.raises(MergebenchError, match="head: missing"):
        without = {key: value for key, value in terms.items() if key != "head"}
        small = {**config, "delta": "pela", "objective": {"distil": without}}
        train(load_config(small), tmp_path / "out", device="cpu")

    head = tmp_path / "other.safetensors"
    save_file(load_file(place / "head.safetensors"), head, {"labels": '["a", "b"]', "pooling": "mean"})
    with pytest.raises(MergebenchError, match="its labels are a, b") as error:
        small = {**config, "delta": "pela", "objective": {"distil": {**terms, "head": str(head)}}}
        train(load_config(small), tmp_path / "out", device="cpu")
    assert error.value.hint == "the task's: first, second"

    delta = {"kind": "pela", "ratio": 1.2}
    learnt = {**config, "model": str(place), "delta": delta, "objective": {"distil": terms}, "epochs": 6}
    made = train(load_config(learnt), tmp_path / "small", device="cpu")

    losses = [one["loss"] for one in made.runs[0]["history"] if "loss" in one]
    assert losses[-1] < 0.7 * losses[0]
    assert made.runs[0]["test"]["value"] > 0.8 * dense.runs[0]["test"]["value"]


def test_features_are_learnt(tmp_path: Path, one_thread: None) -> None:
    terms = {"teacher": str(tmp_path / "base"), "task": 0.0}
    config = classify(tmp_path, delta="pela", objective={"distil": terms}, epochs=5, schedule="constant", lr=1e-2)

    made = train(load_config(config), tmp_path / "out", device="cpu")

    losses = [one["loss"] for one in made.runs[0]["history"] if "loss" in one]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"delta": {"kind": "pela", "ratio": 0.5}}, "delta.ratio: must be at least 1"),
        ({"delta": {"kind": "pela", "ratio": 900}}, "ratio: 900: no linear layer"),
        ({"delta": {"kind": "pela", "omit": ["*.nothing"]}}, r"pela: omit: '\*.nothing' fits no weight"),
        ({"objective": {"distil": {}}}, "objective.distil.teacher: missing"),
        ({"objective": {"distil": {"teacher": "OTHER"}}}, "OTHER: it has another tokenizer"),
        ({"objective": {"distil": {"teacher": "SHALLOW"}}}, "SHALLOW: it has 1 blocks of width 16, BASE has 2 of 16"),
        ({"delta": "bias", "objective": {"distil": {"teacher": "BASE", "perturbation": 1}}}, "nothing is factored"),
    ],
)
def test_refused_before_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: dict[str, Any], message: str
) -> None:
    from transformers import BertConfig, BertModel

    config = classify(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").rename(tmp_path / "BASE")
    write_gpt2(tmp_path / "OTHER")
    shutil.copytree(tmp_path / "BASE", tmp_path / "SHALLOW")
    shallow = BertConfig.from_pretrained(tmp_path / "BASE", num_hidden_layers=1)
    BertModel(shallow).save_pretrained(tmp_path / "SHALLOW")
    with pytest.raises(MergebenchError, match=message):
        train(load_config({**config, "model": "BASE", "delta": "pela", **what}), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
