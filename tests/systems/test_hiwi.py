"""HiWi: nothing changes at first, the fold is the paper's formula, and of biases only the differences are kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoders import write_encoder
from safetensors import safe_open
from safetensors.torch import load_file

from mergebench.deltas.open import open_model
from mergebench.errors import MergebenchError
from mergebench.networks.network import Network
from mergebench.systems.hiwi import Params, hiwi
from mergebench.training import load_config, train
from mergebench.training.attached import Base
from tests.systems.test_pafi_training import write_gpt2
from tests.training.trainable import base_of, classify

IDS = torch.tensor([[2, 5, 9, 11, 3], [2, 7, 7, 30, 3]])
FFN = ("intermediate.dense", "output.dense")


def roberta_base() -> Base:
    """Its architecture, without memory for its weights."""
    from transformers import RobertaConfig, RobertaModel

    with torch.device("meta"):
        module = RobertaModel(
            RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
        ).requires_grad_(False)
    places = {f"{path}.{name}": [(child, name)] for path, child in module.named_modules() for name in child._parameters}
    places = {name: place for name, place in places.items() if getattr(*place[0]) is not None}
    about = {"name": "roberta-base", "device": torch.device("cpu")}
    network: Any = SimpleNamespace(module=module, backbone=module, places=places, **about)
    network.blocks = Network.blocks.fget(network)  # type: ignore[attr-defined]
    return Base(SimpleNamespace(reference="roberta-base"), network, torch.Generator())  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [4, 16])
def test_the_storage_of_roberta_base(rank: int) -> None:
    """12 (3072 + 768) numbers, .04% of its weights, whatever the rank."""
    attached = hiwi(roberta_base(), Params(rank=rank))

    assert sum(put.parameters["b"].shape[0] for put in attached._puts.values()) == 46_080  # type: ignore[attr-defined]
    assert attached.count == 2 * rank * 46_080


@pytest.mark.parametrize("on", ["biases", "weights"])
def test_the_first_difference_is_zero(tmp_path: Path, on: str) -> None:
    plain = base_of(write_encoder(tmp_path / "base"))
    base = base_of(tmp_path / "base")

    attached = hiwi(base, Params(on=on))

    with torch.no_grad():
        before, after = (one.network.module(IDS).last_hidden_state for one in (plain, base))
    assert torch.equal(before, after)
    suffix = "bias" if on == "biases" else "weight"
    changed = {name.removesuffix(".b").removesuffix(".a") for name in attached.parameters}
    assert changed == {f"encoder.layer.{i}.{layer}.{suffix}" for i in range(2) for layer in FFN}


def test_only_the_differences_of_biases_are_kept(tmp_path: Path, one_thread: None) -> None:
    sizes = set()
    for rank in (2, 8):
        delta = {"kind": "hiwi", "rank": rank}
        made = train(load_config(classify(tmp_path, delta=delta, lr=0.1)), tmp_path / f"{rank}", device="cpu")
        file = tmp_path / f"{rank}/hiwi/seed-0/delta.safetensors"
        tensors = load_file(file)
        assert {name: tuple(one.shape) for name, one in tensors.items()} == {
            f"encoder.layer.{i}.{layer}.bias.values": (size,)
            for i in range(2)
            for layer, size in zip(FFN, (32, 16), strict=True)
        }
        assert any(float(one.abs().max()) > 0 for one in tensors.values())
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()["delta"])["tensors"]
        assert {one["kind"] for one in about.values()} == {"dense"}
        assert made.runs[0]["parameters"] == 2 * rank * 2 * (32 + 16)
        sizes.add(file.stat().st_size)
    assert len(sizes) == 1


def test_weights_are_the_papers_formula(tmp_path: Path, one_thread: None) -> None:
    """W + f(W W_down) W_up with W [in, out], of rank r at most."""
    delta = {"kind": "hiwi", "on": "weights", "rank": 3}
    made = train(load_config(classify(tmp_path, delta=delta, lr=0.03)), tmp_path / "out", device="cpu")

    before = open_model(str(tmp_path / "base")).state_dict()
    after = open_model(made.runs[0]["reference"].replace("OUT", str(tmp_path / "out"))).state_dict()
    saved = load_file(tmp_path / "out/hiwi/seed-0/delta.safetensors")
    for name in before:
        if f"{name}.b" not in saved:
            assert torch.equal(before[name], after[name])
            continue
        w, down, up = before[name].T, saved[f"{name}.a"].T, saved[f"{name}.b"].T
        torch.testing.assert_close(after[name].T, w + torch.relu(w @ down) @ up, rtol=1e-5, atol=1e-6)
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert float(values[0]) > 1e-3 and float(values[3]) < 1e-4 * float(values[0])


def test_weights_that_are_stored_the_other_way(tmp_path: Path) -> None:
    """GPT-2's layers are W [in, out] as they are: A reads along the outputs, B writes along them."""
    write_gpt2(tmp_path / "base")
    base = base_of(tmp_path / "base")
    attached = hiwi(base, Params(on="weights", rank=3, targets=["h.0.mlp.c_fc.weight"]))
    place = base.network.places["h.0.mlp.c_fc.weight"][0]
    b, a = (attached.parameters[f"h.0.mlp.c_fc.weight.{part}"] for part in "ba")
    assert b.shape == (64, 3) and a.shape == (3, 64)
    with torch.no_grad():
        w = getattr(*place).clone()
        b.normal_()
        torch.testing.assert_close(getattr(*place), w + torch.relu(w @ a.T) @ b.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        ({"on": "bias"}, "delta.on: must be one of biases, weights"),
        ({"targets": ["*query.weight"]}, r"encoder.layer.0.attention.self.query.weight: \[16, 16\] is no bias"),
        ({"on": "weights", "rank": 17}, r"rank: 17: .* is \[32, 16\]"),
        ({"on": "weights", "targets": ["*query.bias"]}, r"\[16\] is no matrix"),
        ({"targets": ["*nothing*"]}, "names no tensor of"),
    ],
)
def test_refused(tmp_path: Path, delta: dict[str, Any], message: str) -> None:
    with pytest.raises(MergebenchError, match=message):
        train(load_config(classify(tmp_path, delta={"kind": "hiwi", **delta})), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
