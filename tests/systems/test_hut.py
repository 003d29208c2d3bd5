"""HUT (arXiv:2409.13501): its two forms, PEFT's HiRA, weights that are zero, and what a step costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encoders import write_encoder
from safetensors.torch import load_file, save_file
from torch import Generator

from mergebench.deltas.open import open_model
from mergebench.networks.network import Network
from mergebench.systems.hut import Params, hut
from mergebench.training.attached import Attached, Base
from mergebench.training.peft_adapters import peft_adapter

pytestmark = pytest.mark.usefixtures("one_thread")
TARGETS = ["*query.weight", "*intermediate.dense.weight"]
IDS = torch.tensor([[2, 5, 9, 30, 3]])


def base_of(model: Path, more: str = "") -> Base:
    opened = open_model(f"{model}{more}")
    return Base(opened, Network(opened, "AutoModel", torch.device("cpu"), packed=False), Generator().manual_seed(0))


def states(base: Base) -> torch.Tensor:
    """Last states, with gradients."""
    out: torch.Tensor = base.network.module(input_ids=IDS).last_hidden_state
    return out


def moved(attached: Attached, seed: int = 1) -> Attached:
    """With other values than at the start."""
    random = Generator().manual_seed(seed)
    for one in attached.parameters.values():
        one.data.add_(torch.randn(one.shape, generator=random) * 0.3)
    return attached


@pytest.mark.parametrize("form", ["residual", "pure"])
def test_at_the_start_it_is_the_base(tmp_path: Path, form: str) -> None:
    write_encoder(tmp_path / "base")
    base, plain = base_of(tmp_path / "base"), base_of(tmp_path / "base")
    hut(base, Params(rank=2, form=form))
    assert torch.allclose(states(base), states(plain), atol=1e-6)


def test_the_residual_form_is_pefts_hira(tmp_path: Path) -> None:
    """The same factors: the same states, and the same gradients of them."""
    write_encoder(tmp_path / "base")
    ours, theirs = base_of(tmp_path / "base"), base_of(tmp_path / "base")
    attached = moved(hut(ours, Params(rank=3, targets=TARGETS)))
    hira = peft_adapter(theirs, {"peft_type": "HIRA", "r": 3, "target_modules": ["query", "intermediate.dense"]})
    pairs = []
    for name, one in attached.parameters.items():
        tensor, _, part = name.rpartition(".")
        module = tensor.removesuffix(".weight")
        other = hira.parameters[f"base_model.model.{module}.hira_{part.upper()}.default"]
        assert other.shape == one.shape
        other.data.copy_(one.data)
        pairs.append((one, other))
    assert len(pairs) == len(hira.parameters)
    first, second = states(ours), states(theirs)
    assert torch.allclose(first, second, atol=1e-5)
    first.square().sum().backward()
    second.square().sum().backward()
    for one, other in pairs:
        assert one.grad is not None and torch.allclose(one.grad, other.grad, atol=1e-4, rtol=1e-4)


def test_the_pure_form_of_one_more_rank_contains_the_residual_one(tmp_path: Path) -> None:
    write_encoder(tmp_path / "base")
    first, second = base_of(tmp_path / "base"), base_of(tmp_path / "base")
    residual = moved(hut(first, Params(rank=2, targets=TARGETS)))
    pure = hut(second, Params(rank=3, form="pure", targets=TARGETS))
    for name, one in pure.parameters.items():  # [1, B] [1; A] = 1 + B A
        factor = one.data if name.endswith(".b") else one.data.T
        assert (factor[:, 0] == 1).all()
        other = residual.parameters[name].data
        factor[:, 1:] = other if name.endswith(".b") else other.T
    assert torch.allclose(states(first), states(second), atol=1e-5)


@pytest.mark.parametrize("form", ["residual", "pure"])
def test_weights_that_are_zero_stay_zero(tmp_path: Path, form: str) -> None:
    write_encoder(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    name = "encoder.layer.0.attention.self.query.weight"
    tensors[name] = tensors[name] * (torch.rand(16, 16, generator=Generator().manual_seed(3)) < 0.5)
    save_file(tensors, file, {"format": "pt"})
    base = base_of(tmp_path / "base")
    attached = moved(hut(base, Params(rank=2, form=form)))
    (tmp_path / "saved").mkdir()
    attached.save(tmp_path / "saved")
    folded = base_of(tmp_path / "base", f"+{tmp_path / 'saved'}").weights[name].values
    zero = tensors[name] == 0
    assert zero.any() and torch.equal(folded[zero], torch.zeros(int(zero.sum())))
    assert not torch.allclose(folded[~zero], tensors[name][~zero], atol=0.01)


@pytest.mark.parametrize(("rows", "columns", "rank", "tokens"), [(12, 20, 2, 5), (24, 16, 6, 40)])
def test_what_a_step_costs(rows: int, columns: int, rank: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The FLOPs that torch counts are those of the benchmark's formulas."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import hut_steps

    for kind in hut_steps.KINDS:
        step = hut_steps.layer(kind, rows, columns, rank)
        assert hut_steps.count(step, tokens) == hut_steps.flops(kind, rows, columns, rank, tokens)
