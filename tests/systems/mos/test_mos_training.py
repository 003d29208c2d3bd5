"""Training equals a plain loop over whole batches, written out with torch's own optimiser and one graph a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergebench.errors import RunError
from mergebench.networks.features import Pooling, Texts
from mergebench.networks.network import Network
from mergebench.systems.mos.encoder import Encoder
from mergebench.systems.mos.merging import Alone, Merging, Paper
from mergebench.systems.mos.training import Items, Settings, Trained, train
from tests.evaluation.conftest import Files, write_encoder

WORDS = ["w1 w2", "w4 w3 w3 w2 w5 w4 w6 w7", "w8 w9", "w1", "w7 w10 w11 w12", "w3", "w9", "w4 w2"]
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
SETTINGS = Settings(epochs=3, batch=3, lr=0.2, weight_decay=0.01, orthogonality=0.3, dropout=0.0)
ALPHA = 0.3


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    network = Network(Files(write_encoder(tmp_path / "encoder")), "AutoModel", torch.device("cpu"))
    return Encoder(network, Pooling(), 0.5)


def start(encoder: Encoder, seed: int = 0) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    new = encoder.new_adapter(4, source)
    return {name: tensor + 0.3 * torch.randn(tensor.shape, generator=source) for name, tensor in new.items()}


def learn(encoder: Encoder, merging: Merging, means: Tensor | None, settings: Settings = SETTINGS) -> Trained:
    items = Items(Texts(WORDS, 16), range(len(WORDS)), LABELS)
    return train(
        encoder, items, start(encoder), means, merging, settings, torch.Generator().manual_seed(5), lambda n: None
    )


def by_hand(encoder: Encoder, mean: dict[str, Tensor] | None, means: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """The same numbers drawn in the same order; no parts, no threads."""
    generator = torch.Generator().manual_seed(5)
    adapter = {name: tensor.requires_grad_() for name, tensor in start(encoder).items()}
    bound = encoder.width**-0.5
    weight = (torch.rand(3, encoder.width, generator=generator) * 2 * bound - bound).requires_grad_()
    bias = (torch.rand(3, generator=generator) * 2 * bound - bound).requires_grad_()
    texts = Texts(WORDS, 16)
    velocity: dict[int, Tensor] = {}
    for epoch in range(3):
        rate = 0.2 * (1 + torch.cos(torch.tensor(torch.pi * epoch / 3)).item()) / 2
        for chosen in torch.randperm(8, generator=generator).split(3):
            rows = encoder.rows(texts, chosen.tolist(), adapter)
            everything = rows if means is None else torch.cat([means, rows])
            overlap = cross_entropy(everything @ everything.T / 0.8, torch.arange(len(everything)))
            loss = cross_entropy(rows @ weight.T + bias, LABELS[chosen]) + 0.3 * overlap
            every = [*adapter.values(), weight, bias]
            slopes = torch.autograd.grad(loss, every)
            with torch.no_grad():
                for number, (tensor, slope) in enumerate(zip(every, slopes, strict=True)):
                    step = slope + 0.01 * tensor
                    velocity[number] = step if number not in velocity else 0.9 * velocity[number] + step
                    tensor -= (rate if number < len(adapter) else rate / 10) * velocity[number]
                if mean is not None:
                    for name, tensor in adapter.items():
                        tensor.copy_((1 - ALPHA) * tensor + ALPHA * mean[name])
    return {name: tensor.detach() for name, tensor in adapter.items()}, weight.detach()


@pytest.mark.parametrize("tokens", [512, 6])
@pytest.mark.parametrize("first", [True, False])
def test_a_plain_loop(first: bool, tokens: int, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first task, and one that is merged and kept apart from the means of classes before."""
    monkeypatch.setattr("mergebench.networks.training.CPU_TOKENS", tokens)
    mean = None if first else start(encoder, seed=9)
    means = None if first else torch.randn(2, encoder.width, generator=torch.Generator().manual_seed(1))
    found = learn(encoder, Alone() if mean is None else Paper(mean, ALPHA), means)
    adapter, weight = by_hand(encoder, mean, means)
    for name in adapter:
        torch.testing.assert_close(found.adapter[name], adapter[name], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.weight, weight, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_on_any_number_of_cores(threads: int, encoder: Encoder) -> None:
    """To the bit, dropout too; and what it begins from is only read."""
    settings = Settings(epochs=2, batch=4, lr=0.2, dropout=0.4)
    before = torch.get_num_threads()
    known = learn(encoder, Alone(), None, settings)
    try:
        torch.set_num_threads(threads)
        again = learn(encoder, Alone(), None, settings)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(known.adapter[name], again.adapter[name]) for name in known.adapter)
    assert torch.equal(known.weight, again.weight)
    assert not known.weight.requires_grad and not any(one.requires_grad for one in known.adapter.values())


def test_it_learns(encoder: Encoder) -> None:
    found = learn(encoder, Alone(), None, Settings(epochs=120, batch=8, lr=0.1, orthogonality=0.0, dropout=0.0))
    assert found.accuracy == 1
    features = encoder.features(Texts(WORDS, 16), range(8), found.adapter, lambda n: None)
    assert torch.equal((features @ found.weight.T + found.bias).argmax(1), LABELS)


def test_a_rate_too_high(encoder: Encoder) -> None:
    with pytest.raises(RunError, match="the loss is not finite") as caught:
        learn(encoder, Alone(), None, Settings(epochs=30, batch=8, lr=1e12))
    assert caught.value.hint == "give a smaller lr than 1e+12"
