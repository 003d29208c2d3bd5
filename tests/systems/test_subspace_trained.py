"""Training in a random subspace: P as `deltas/subspace.py` has it, true gradients, the authors' gradients, SAID."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Generator, Tensor

from mergebench.deltas.formats.native import read_file
from mergebench.deltas.open import open_model
from mergebench.deltas.subspace import Subspace, prepared
from mergebench.deltas.subspace import subspace as folded
from mergebench.errors import RecipeError
from mergebench.networks.network import Network
from mergebench.systems.intrinsic_dimension import subspace
from mergebench.systems.intrinsic_dimension.fastfood import Fastfood, transformed
from mergebench.training import load_config, train
from mergebench.training.attached import Base
from tests.encoders import write_encoder
from tests.training.trainable import classify

SHAPES = {"a": (6, 9), "b": (7, 8), "c": (5, 11)}  # n = 64 for each


def drawn(d: int) -> list[Subspace]:
    return [prepared(Subspace(torch.zeros(d), name, 3), shape) for name, shape in SHAPES.items()]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 512, 2048, 1 << 17])
def test_the_transform_is_hadamards_matrix(n: int) -> None:
    """Against one row of the matrix at a time: (-1)^(bits that row and column share)."""
    x = random(2, n)
    out = transformed(x)
    for row in {0, 1 % n, n // 2, n - 1}:
        signs = torch.tensor([1 - 2 * ((row & column).bit_count() % 2) for column in range(n)])
        assert torch.allclose(out[:, row], (x * signs).sum(1), atol=1e-9)


@pytest.mark.parametrize("d", [3, 20, 100])
def test_it_is_what_a_saved_delta_means(d: int) -> None:
    several, theta = drawn(d), random(d).float()
    out = Fastfood(several, d)(theta, torch.tensor([1.0, 2.0, -0.5]))
    for one, change, scale in zip(several, out, (1.0, 2.0, -0.5), strict=True):
        p = prepared(Subspace(theta, one.name, 3, scale), (one.rows, one.columns))
        assert torch.allclose(change, folded(p, slice(None), None), atol=1e-5)


def test_gradients_are_those_of_differences() -> None:
    fastfood = Fastfood(drawn(20), 20, [2, 0, 3])
    theta, lambdas = random(20).requires_grad_(), random(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *of: fastfood(*of), (theta, lambdas), fast_mode=True)


def test_the_authors_gradient_is_the_true_one_over_n() -> None:
    fastfood, theta, lambdas = Fastfood(drawn(20), 20), random(20).requires_grad_(), random(3).requires_grad_()
    slopes = [random(*shape, seed=7) for shape in SHAPES.values()]
    true = torch.autograd.grad(fastfood(theta, lambdas), (theta, lambdas), slopes)
    theirs = torch.autograd.grad(fastfood(theta, lambdas, 1 / 64), (theta, lambdas), slopes)
    assert torch.allclose(64 * theirs[0], true[0]) and torch.equal(theirs[1], true[1])
    first = prepared(Subspace(theta.detach().clone().requires_grad_(), "a", 3, gradient="fairseq"), SHAPES["a"])
    (alone,) = torch.autograd.grad(folded(first, slice(None), None), first.theta, slopes[0])
    ours = Fastfood(drawn(20)[:1], 20)(theta, torch.ones(1, dtype=torch.float64), 1 / 64)
    (together,) = torch.autograd.grad(ours, theta, slopes[:1])
    assert torch.allclose(together, alone, rtol=1e-5)


def attach(folder: Path, **params: Any) -> tuple[Network, Any]:
    write_encoder(folder)
    model = open_model(str(folder))
    network = Network(model, "AutoModel", torch.device("cpu"), packed=False)
    head = {"weight": torch.zeros(2, 16), "bias": torch.zeros(2)}
    base = Base(model, network, Generator().manual_seed(0), 1, head)
    return network, subspace(base, subspace.params(**params))


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_d_is_all_that_is_trained(tmp_path: Path, said: bool, head: bool) -> None:
    _, attached = attach(tmp_path, d=100, said=said, head=head)
    assert attached.count == 100
    count = len({name for name in load_file(tmp_path / "model.safetensors") if "position_ids" not in name})
    assert len(attached.parameters) == 1 + said
    if said:
        (lambdas,) = (one for name, one in attached.parameters.items() if name.endswith("scale"))
        assert len(lambdas) == count + 2 * head


def test_theta_of_zero_is_the_base_to_the_bit(tmp_path: Path) -> None:
    _, attached = attach(tmp_path / "base", d=100, said=True)
    attached.save(tmp_path / "out")
    base, same = (open_model(ref).state_dict() for ref in (f"{tmp_path}/base", f"{tmp_path}/base+{tmp_path}/out"))
    assert all(torch.equal(values.view(torch.int32), same[name].view(torch.int32)) for name, values in base.items())


def test_a_graph_serves_several_backward_passes_and_a_step_makes_a_new_one(tmp_path: Path) -> None:
    network, attached = attach(tmp_path, d=50, said=True)
    theta, lambdas = attached.parameters.values()
    ids = torch.tensor([[2, 5, 6, 3]])

    def slope() -> Tensor:
        network.module(ids).last_hidden_state.square().sum().backward()
        found = theta.grad.clone()
        theta.grad = None
        return found

    first = slope()
    assert torch.equal(slope(), first)
    with torch.no_grad():
        theta.add_(0.1)
    assert not torch.allclose(slope(), first)
    with torch.no_grad():
        lambdas.mul_(0)
    assert not slope().any()
    assert lambdas.grad.any()


@pytest.mark.parametrize("head", [False, True])
def test_a_run_saves_d_numbers_and_its_lambdas(tmp_path: Path, head: bool, one_thread: None) -> None:
    delta = {"kind": "subspace", "d": 80, "said": True, "head": head, "seed": 5}
    train(load_config(classify(tmp_path, delta=delta, weight_decay=0)), tmp_path / "out", device="cpu")

    place = tmp_path / "out/subspace/seed-0"
    entries = read_file(place / "delta.safetensors").entries
    scales = [entry.settings["scale"] for entry in entries.values()]
    (theta,) = load_file(place / "delta.safetensors").values()
    assert len(theta) == 80 - len(entries) - 2 * head
    assert theta.any() and any(scale != 1 for scale in scales)
    assert {entry.settings["seed"] for entry in entries.values()} == {5}
    weight = load_file(place / "head.safetensors")["weight"]
    if head:
        p = prepared(Subspace(theta, "head/weight", 5), tuple(weight.shape))
        change = folded(p, slice(None), None)
        assert torch.allclose(weight / weight.norm(), change / change.norm(), atol=1e-5)
    else:
        assert weight.any()


def test_said_needs_more_than_its_lambdas(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="d: 20: SAID has a lambda for each of"):
        attach(tmp_path, d=20, said=True)
