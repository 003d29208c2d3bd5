"""PaFi's fine-tune: exactly the chosen elements move, to the bit; their gradients are those of the whole weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoders import write_encoder
from safetensors.torch import load_file
from torch import Tensor

from mergebench.adapters import extract_adapter
from mergebench.deltas.open import open_model
from mergebench.errors import MergebenchError
from mergebench.systems.pafi import make_mask
from mergebench.systems.pafi.training import Params, _chosen, pafi
from mergebench.training import load_config, train
from mergebench.training.attached import Attached, Base, Weight
from tests.training.trainable import base_of, classify

THETA = torch.tensor([0.5, -0.1, 0.02, -0.03, 0.3, 0.02])
IDS = torch.tensor([[2, 5, 9, 11, 3], [2, 7, 7, 30, 3]])


def write_gpt2(directory: Path) -> None:
    """A model whose linear layers are stored [in, out]."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    GPT2Model(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)).save_pretrained(directory)


def positions(attached: Attached, base: Base) -> dict[str, Tensor]:
    """The trained positions by tensor."""
    return {name: put.fixed["indices"].long() for name, put in attached._puts.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("choose", "share", "expected"),
    [
        ("smallest", 0.5, [2, 3, 5]),
        ("smallest", 1 / 6, [2]),
        ("largest", 1 / 3, [0, 4]),
        ("largest", 5 / 6, [0, 1, 2, 3, 4]),
    ],
)
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_golden(choose: str, share: float, expected: list[int], scope: str) -> None:
    """Of equal magnitudes the lower position goes first."""
    base: Any = SimpleNamespace(generator=torch.Generator())
    weights = {"theta": Weight("theta", THETA, True, False, False)}

    found = _chosen(base, weights, Params(share=share, choose=choose, scope=scope))

    assert found["theta"].tolist() == expected


@pytest.mark.parametrize("choose", ["smallest", "largest", "random"])
def test_what_has_no_rank(choose: str) -> None:
    base: Any = SimpleNamespace(generator=torch.Generator(), model=SimpleNamespace(reference="base"))
    theta = THETA.index_fill(0, torch.tensor(1), torch.nan)
    weights = {"theta": Weight("theta", theta, True, False, False)}
    if choose == "random":
        assert len(_chosen(base, weights, Params(share=0.5, choose=choose))["theta"]) == 3
        return
    with pytest.raises(MergebenchError, match="base: theta: it holds NaN or infinity, which has no rank"):
        _chosen(base, weights, Params(share=0.5, choose=choose))


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("choose", ["smallest", "largest", "random"])
def test_the_count_is_exact(tmp_path: Path, scope: str, choose: str) -> None:
    base = base_of(write_encoder(tmp_path / "base"), seed=3)
    sizes = {name: one.values.numel() for name, one in base.weights.items() if one.linear}

    attached = pafi(base, Params(share=0.013, choose=choose, scope=scope))

    found = positions(attached, base)
    if scope == "model":
        assert attached.count == round(0.013 * sum(sizes.values()))
    else:
        assert {name: len(one) for name, one in found.items()} == {n: round(0.013 * s) for n, s in sizes.items()}
    again = positions(pafi(base_of(tmp_path / "base", seed=3), Params(share=0.013, choose=choose, scope=scope)), base)
    other = positions(pafi(base_of(tmp_path / "base", seed=4), Params(share=0.013, choose=choose, scope=scope)), base)
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert (choose == "random") == any(not torch.equal(found[n], other.get(n, found[n][:0])) for n in found)


def test_the_mask_of_the_command(tmp_path: Path) -> None:
    """`mask magnitude` chooses the same elements, and its file trains them."""
    base = base_of(write_encoder(tmp_path / "base"))
    make_mask(str(tmp_path / "base"), tmp_path / "mask.safetensors", share=0.02)
    mask = load_file(tmp_path / "mask.safetensors")

    alike = positions(pafi(base, Params(share=0.02, targets=["*"])), base)
    from_file = positions(pafi(base_of(tmp_path / "base"), Params(mask=tmp_path / "mask.safetensors")), base)

    for found in (alike, from_file):
        assert found.keys() == mask.keys()
        assert all(torch.equal(found[name], mask[name].long()) for name in mask)


@pytest.mark.parametrize("more", [{}, {"targets": ["*"], "share": 0.3}])
def test_nothing_else_moves(tmp_path: Path, more: dict[str, Any], one_thread: None) -> None:
    """Trained by AdamW with weight decay, every other element is the base's to the bit."""
    delta = {"kind": "pafi", "share": 0.02, **more}
    made = train(load_config(classify(tmp_path, delta=delta, weight_decay=0.5)), tmp_path / "out", device="cpu")

    before = open_model(str(tmp_path / "base")).state_dict()
    after = open_model(made.runs[0]["reference"].replace("OUT", str(tmp_path / "out"))).state_dict()
    saved = load_file(tmp_path / "out/pafi/seed-0/delta.safetensors")
    moved = 0
    for name, value in before.items():
        outside = torch.ones(value.numel(), dtype=torch.bool)
        outside[saved.get(f"{name}.indices", torch.empty(0)).long()] = False
        assert torch.equal(after[name].flatten()[outside], value.flatten()[outside]), name
        moved += int((after[name] != value).sum())
    assert made.runs[0]["parameters"] == sum(len(one) for name, one in saved.items() if name.endswith(".indices"))
    assert 0.7 * made.runs[0]["parameters"] < moved <= made.runs[0]["parameters"]


def test_nothing_else_moves_in_memory(tmp_path: Path) -> None:
    """By momentum and decay, in the network itself, which is written into."""
    base = base_of(write_encoder(tmp_path / "base"))
    before = {name: one.values.clone() for name, one in base.weights.items()}
    attached = pafi(base, Params(share=0.05))
    optimizer = torch.optim.SGD(attached.parameters.values(), lr=0.1, momentum=0.9, weight_decay=0.3)

    for _ in range(3):
        optimizer.zero_grad()
        base.network.module(IDS).last_hidden_state[..., 0].square().sum().backward()
        optimizer.step()
    base.network.module(IDS)

    found = positions(attached, base)
    for name, weight in before.items():
        now = getattr(*base.network.places[name][0]).detach().flatten()
        changed = (now != weight.flatten()).nonzero().flatten()
        assert set(changed.tolist()) <= set(found.get(name, torch.empty(0)).tolist()), name
        assert name not in found or len(changed) > 0.9 * len(found[name])


@pytest.mark.parametrize("share", [0.05, 0.4])  # by scalar products, and from the whole gradient
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_gradients_are_those_of_the_weights(tmp_path: Path, share: float, family: str) -> None:
    """Of two forward passes before one backward pass, as distillation has them."""
    write_encoder(tmp_path / "base") if family == "bert" else write_gpt2(tmp_path / "base")
    base, plain = base_of(tmp_path / "base"), base_of(tmp_path / "base")
    attached = pafi(base, Params(share=share, targets=["*"]))
    with torch.no_grad():
        for one in attached.parameters.values():
            one.normal_(std=0.05)
    found = positions(attached, base)
    whole: dict[str, Tensor] = {}
    for name, indices in found.items():
        whole[name] = getattr(*plain.network.places[name][0])
        with torch.no_grad():
            whole[name].view(-1)[indices] += attached.parameters[f"{name}.values"]
        whole[name].requires_grad_()

    for one in (base, plain):
        states = [one.network.module(ids % 8).last_hidden_state for ids in (IDS, IDS.flip(1))]
        sum(state[..., :3].pow(3).sum() for state in states).backward()  # type: ignore[union-attr]

    for name, indices in found.items():
        expected, values = whole[name].grad, attached.parameters[f"{name}.values"]
        if expected is not None:  # a pooler's is not asked for
            assert values.grad is not None
            torch.testing.assert_close(values.grad, expected.flatten()[indices], rtol=2e-4, atol=2e-4)


def test_in_bfloat16(tmp_path: Path) -> None:
    base = base_of(write_encoder(tmp_path / "base"))
    attached = pafi(base, Params(share=0.05))

    def gradients() -> list[Tensor]:
        for one in attached.parameters.values():
            one.grad = None
        base.network.module(IDS).last_hidden_state[..., :3].sum().backward()
        return [one.grad for one in attached.parameters.values() if one.grad is not None]

    exact = torch.cat(gradients())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = torch.cat(gradients())
    assert float((exact - rounded).norm()) < 0.05 * float(exact.norm())


def test_values_on_a_shared_mask(tmp_path: Path, one_thread: None) -> None:
    """What was trained on a mask goes into the form that shares the mask."""
    config = classify(tmp_path)
    mask = tmp_path / "mask.safetensors"
    make_mask(config["model"], mask, share=0.02, include=["*dense.weight", "*query.weight"])
    made = train(load_config({**config, "delta": {"kind": "pafi", "mask": str(mask)}}), tmp_path / "out", device="cpu")
    reference = made.runs[0]["reference"].replace("OUT", str(tmp_path / "out"))

    extract_adapter(config["model"], reference, tmp_path / "task", as_="sparse", mask=str(mask))

    one, other = (
        open_model(reference).state_dict(),
        open_model(f"{config['model']}+{tmp_path / 'task/values.safetensors'}"),
    )
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, one[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        ({"share": 1e-6}, "share: 1e-06 of .* elements is less than one"),
        ({"share": 0}, "delta.share: must be above 0, at most 1, got 0"),
        ({"choose": "large"}, "delta.choose: must be one of smallest, largest, random"),
        ({"mask": "MASK", "targets": ["*"]}, "targets: the mask says which tensors"),
        ({"mask": "OTHER"}, "it was made on another model than"),
        ({"mask": "none.safetensors"}, "no such file: none.safetensors"),
    ],
)
def test_refused(tmp_path: Path, delta: dict[str, Any], message: str) -> None:
    config = classify(tmp_path)
    for name, seed in (("MASK", 0), ("OTHER", 1)):
        make_mask(
            str(write_encoder(tmp_path / name / "model", seed=seed)), tmp_path / f"{name}.safetensors", share=0.01
        )
    if delta.get("mask") in ("MASK", "OTHER"):
        delta = {**delta, "mask": str(tmp_path / f"{delta['mask']}.safetensors")}

    with pytest.raises(MergebenchError, match=message):
        train(load_config({**config, "delta": {"kind": "pafi", **delta}}), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
