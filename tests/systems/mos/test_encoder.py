"""Adapters in the blocks of transformers' encoders equal block by block arithmetic written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergebench.errors import ModelError
from mergebench.evaluation.images import Images, Prepared
from mergebench.evaluation.labelled import read_images
from mergebench.networks.bottleneck import Dropout
from mergebench.networks.features import Pooling, Texts
from mergebench.networks.network import Network
from mergebench.systems.mos.encoder import Encoder
from tests.evaluation.conftest import HIDDEN, Files, write_encoder
from tests.evaluation.test_images import write_image_encoder, write_images

CPU = torch.device("cpu")
SCALE = 0.3
TOKENS = [[2, 7, 9, 30, 3], [2, 11, 3], [2, 5, 5, 6, 8, 3]]


def never(items: int) -> None: ...


def network(directory: Path) -> Network:
    return Network(Files(directory), "AutoModel", CPU)


def some_adapter(encoder: Encoder, seed: int = 0) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    new = encoder.new_adapter(4, source)
    return {name: tensor + 0.4 * torch.randn(tensor.shape, generator=source) for name, tensor in new.items()}


def beside(adapter: Mapping[str, Tensor], block: str, x: Tensor) -> Tensor:
    """s (U relu(D x + d) + u)"""
    inner = (x @ adapter[f"{block}.down.weight"].T + adapter[f"{block}.down.bias"]).clamp(min=0)
    return SCALE * (inner @ adapter[f"{block}.up.weight"].T + adapter[f"{block}.up.bias"])


def vit(layer: Any, x: Tensor, delta: Callable[[Tensor], Tensor]) -> Tensor:
    x = x + layer.attention(layer.layernorm_before(x), None)[0]
    return x + layer.mlp(layer.layernorm_after(x)) + delta(x)


def dinov2(layer: Any, x: Tensor, delta: Callable[[Tensor], Tensor]) -> Tensor:
    x = x + layer.layer_scale1(layer.attention(layer.norm1(x))[0])
    return x + layer.layer_scale2(layer.mlp(layer.norm2(x))) + delta(x)


def siglip(layer: Any, x: Tensor, delta: Callable[[Tensor], Tensor]) -> Tensor:
    x = x + layer.self_attn(layer.layer_norm1(x), attention_mask=None)[0]
    return x + layer.mlp(layer.layer_norm2(x)) + delta(x)


def bert(layer: Any, x: Tensor, delta: Callable[[Tensor], Tensor]) -> Tensor:
    x = layer.attention(x, None)[0]
    return layer.output.LayerNorm(layer.output.dense(layer.intermediate(x)) + delta(x) + x)


def distilbert(layer: Any, x: Tensor, delta: Callable[[Tensor], Tensor]) -> Tensor:
    x = layer.sa_layer_norm(layer.attention(x)[0] + x)
    return layer.output_layer_norm(layer.ffn(x) + delta(x) + x)


@pytest.mark.parametrize("family", [vit, dinov2, siglip, bert, distilbert], ids=lambda family: family.__name__)
def test_blocks_by_hand(family: Any, tmp_path: Path) -> None:
    """All items of one length, so that no mask is needed."""
    if family in (bert, distilbert):
        found = network(write_encoder(tmp_path / "encoder", family.__name__))
        given: dict[str, Any] = {"input_ids": torch.tensor([TOKENS[0], TOKENS[0][::-1]])}
    else:
        found = network(write_image_encoder(tmp_path / "encoder", family.__name__))
        given = {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))}
    states: dict[str, Tensor] = {}
    first = next(iter(found.blocks.values()))
    first.register_forward_pre_hook(
        lambda module, args, kwargs: states.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    plain = found.module(**given).last_hidden_state
    x = states["x"]
    for block in found.blocks.values():
        x = family(block, x, torch.zeros_like)
    named = [name for name in ("layernorm", "post_layernorm") if hasattr(found.module, name)]
    final = getattr(found.module, named[0]) if named else torch.nn.Identity()
    torch.testing.assert_close(final(x), plain, atol=1e-5, rtol=1e-5)  # the hand's way is the model's
    adapter = some_adapter(encoder := Encoder(found, Pooling("cls"), SCALE))
    x = states["x"]
    for name, block in found.blocks.items():
        x = family(block, x, lambda value, name=name: beside(adapter, name, value))
    expected = final(x)

    class Given:
        def rows(self, network: Network, positions: Any, pooling: Pooling) -> Tensor:
            return pooling(network.module(**given).last_hidden_state, torch.ones(2, expected.shape[1]))

    torch.testing.assert_close(encoder.rows(Given(), [0, 1], adapter), expected[:, 0], atol=1e-5, rtol=1e-5)  # type: ignore[arg-type]
    assert not torch.allclose(expected, plain, atol=1e-2)


@pytest.fixture
def texts() -> Texts:
    words = ["w1 w2", "w4 w3 w3 w2 w5 w4 w6 w7", "w8 w9", "w1", "w7 w10 w11 w12", "w3"]
    return Texts(words, 16)


def test_what_adds_nothing(tmp_path: Path, texts: Texts) -> None:
    """A new adapter leaves every bit as it is; so does having none."""
    alone = network(write_encoder(tmp_path / "encoder"))
    before = Pooling()(*alone.encode(texts.tokens(alone)))
    encoder = Encoder(network(tmp_path / "encoder"), Pooling(), SCALE)
    new = encoder.new_adapter(4, torch.Generator().manual_seed(0))
    everything = list(range(len(texts)))
    assert torch.equal(encoder.rows(texts, everything, None), before)
    assert torch.equal(encoder.rows(texts, everything, new), before)
    bound = HIDDEN**-0.5  # kaiming_uniform with a = sqrt 5
    down = new[f"{encoder.blocks[0]}.down.weight"]
    assert -bound <= down.min() < -0.8 * bound < 0.8 * bound < down.max() <= bound


def test_features_know_nothing_of_their_batch(tmp_path: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(network(write_encoder(tmp_path / "encoder")), Pooling(), SCALE)
    adapter = some_adapter(encoder)
    copies = {name: tensor.clone() for name, tensor in adapter.items()}
    every = encoder.features(texts, range(6), adapter, never)
    again = encoder.features(texts, range(6), adapter, never)
    assert torch.equal(every, again)
    some = encoder.features(texts, [4, 1, 1], adapter, never)
    torch.testing.assert_close(some, every[[4, 1, 1]], atol=1e-6, rtol=1e-5)
    monkeypatch.setattr("mergebench.networks.features.CPU_TOKENS", 1)
    torch.testing.assert_close(encoder.features(texts, range(6), adapter, never), every, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(adapter[name], copies[name]) for name in adapter)
    assert not torch.allclose(encoder.features(texts, range(6), None, never), every, atol=1e-3)


def test_gradients_through_packed_layers(tmp_path: Path, texts: Texts) -> None:
    """The loss's slope along a random direction, against two evaluations."""
    encoder = Encoder(network(write_encoder(tmp_path / "encoder")), Pooling(), SCALE)
    adapter = some_adapter(encoder)
    weights = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(3))

    def loss(of: Mapping[str, Tensor]) -> Tensor:
        return (encoder.rows(texts, list(range(6)), of) * weights).sum()

    leaves = {name: tensor.clone().requires_grad_() for name, tensor in adapter.items()}
    slopes = torch.autograd.grad(loss(leaves), list(leaves.values()))
    assert all(slope.any() for slope in slopes)
    for number, name in enumerate(adapter):
        way = torch.randn(adapter[name].shape, generator=torch.Generator().manual_seed(number))
        way /= way.norm()
        near = [float(loss({**adapter, name: adapter[name] + step * way})) for step in (-3e-3, 3e-3)]
        assert float((slopes[number] * way).sum()) == pytest.approx((near[1] - near[0]) / 6e-3, abs=0.03, rel=0.03)


def test_dropout(tmp_path: Path, texts: Texts) -> None:
    """A seed says what is dropped; the mean over many is near what nothing dropped gives, to first order."""
    encoder = Encoder(network(write_encoder(tmp_path / "encoder")), Pooling(), SCALE)
    adapter = {name: 0.05 * tensor for name, tensor in some_adapter(encoder).items()}
    whole = encoder.rows(texts, [0, 1], adapter)
    one = encoder.rows(texts, [0, 1], adapter, Dropout(0.5, 1))
    assert torch.equal(one, encoder.rows(texts, [0, 1], adapter, Dropout(0.5, 1)))
    assert not torch.equal(one, encoder.rows(texts, [0, 1], adapter, Dropout(0.5, 2)))
    drop = Dropout(0.25, 7).begin()
    kept = drop(torch.ones(200, 500))
    assert set(kept.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert float(kept.mean()) == pytest.approx(1, abs=0.01)
    many = torch.stack([encoder.rows(texts, [0, 1], adapter, Dropout(0.5, seed)) for seed in range(300)])
    plain = encoder.rows(texts, [0, 1], None)
    assert float((many.mean(0) - whole).norm()) < 0.2 * float((whole - plain).norm())


def test_images_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(network(write_image_encoder(tmp_path / "encoder")), Pooling("cls+mean"), SCALE)
    images = read_images(write_images(tmp_path / "data.jsonl", 9), "id", "image", "label").inputs
    assert isinstance(images, Images)
    adapter = some_adapter(encoder)
    held = images.held(encoder.network)
    assert isinstance(held, Prepared)
    assert held.key == images.key
    there = encoder.features(held, range(9), adapter, never)
    assert there.shape == (9, encoder.width) == (9, 2 * HIDDEN)
    assert torch.equal(there, encoder.features(images, range(9), adapter, never))
    size = 9 * 3 * 12 * 12 * 4
    monkeypatch.setattr("mergebench.evaluation.images.available_memory", lambda: 4 * size - 1)
    assert images.held(encoder.network) is images
    monkeypatch.setattr("mergebench.evaluation.images.available_memory", lambda: 4 * size)
    assert isinstance(images.held(encoder.network), Prepared)


def test_models_without_a_place(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, vocab_size=40, num_key_value_heads=1))
    model.save_pretrained(tmp_path / "llama")
    with pytest.raises(ModelError, match="no place for an adapter is known in its blocks") as caught:
        Encoder(network(tmp_path / "llama"), Pooling(), SCALE)
    assert "LlamaDecoderLayer" in caught.value.message
