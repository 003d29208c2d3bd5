"""Gradients in parts equal one graph of the whole batch, the same bits on any number of cores; the loop is torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergebench.errors import RunError
from mergebench.networks.training import Gradients, Parameters, gradients, train

CPU = torch.device("cpu")
WIDTH, CLASSES = 768, 5
LENGTHS = [3, 90, 250, 7, 7, 41, 300, 5, 120, 33, 2, 64]
LABELS = torch.arange(len(LENGTHS)) % CLASSES


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ITEMS = [random(length, WIDTH, seed=length + 1000 * number) for number, length in enumerate(LENGTHS)]
BASE = random(WIDTH, WIDTH, seed=1) / WIDTH**0.5


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def parameters() -> dict[str, Tensor]:
    """A LoRA on a linear layer, a head, and what nothing uses."""
    return {
        "lora_A": random(4, WIDTH, seed=2) / WIDTH**0.5,
        "lora_B": random(WIDTH, 4, seed=3) / 2,
        "head": random(CLASSES, WIDTH, seed=4) / WIDTH**0.5,
        "unused": random(3, seed=5),
    }


def rows(part: list[int], given: Parameters) -> Tensor:
    weight = BASE + given["lora_B"] @ given["lora_A"]
    return torch.stack([torch.tanh(ITEMS[item] @ weight.T).mean(0) for item in part])


def loss(features: Tensor, given: Parameters) -> Tensor:
    """It couples the items, and has a parameter that the rows do not have, and one that they have."""
    apart = cross_entropy(features @ features.T * 9, torch.arange(len(features)))
    return cross_entropy(features @ given["head"].T * 9, LABELS) + apart + given["lora_A"].square().sum()


def by_item(part: list[int], given: Parameters) -> Tensor:
    return cross_entropy(rows(part, given) @ given["head"].T * 9, LABELS[part], reduction="none")


def whole(of: Callable[[Parameters], Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    leaves = {name: tensor.requires_grad_() for name, tensor in parameters().items()}
    value = of(leaves)
    slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return value.detach(), dict(zip(leaves, slopes, strict=True))


ALL = list(range(len(LENGTHS)))


@pytest.mark.parametrize("tokens", [512, 100])
@pytest.mark.parametrize("coupled", [True, False])
def test_one_graph(coupled: bool, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergebench.networks.training.CPU_TOKENS", tokens)
    given = parameters()
    if coupled:
        found = gradients(given, rows, LENGTHS, CPU, loss)
        value, slopes = whole(lambda leaves: loss(rows(ALL, leaves), leaves))
        expected = rows(ALL, given)
    else:
        found = gradients(given, by_item, LENGTHS, CPU)
        value, slopes = whole(lambda leaves: by_item(ALL, leaves).mean())
        expected = by_item(ALL, given)
    torch.testing.assert_close(found.loss, value)
    torch.testing.assert_close(found.rows, expected)
    assert slopes.pop("unused") is None
    assert set(found.parameters) == set(slopes) == {"lora_A", "lora_B", "head"}
    for name, slope in slopes.items():
        torch.testing.assert_close(found.parameters[name], slope, atol=1e-6, rtol=1e-4)
        assert torch.equal(given[name], parameters()[name])
        assert not given[name].requires_grad and given[name].grad is None


def test_rows_of_several_numbers_and_a_head_alone() -> None:
    """The mean over all elements; and rows that no parameter is in."""
    found = gradients(parameters(), rows, LENGTHS, CPU)
    value, slopes = whole(lambda leaves: rows(ALL, leaves).mean())
    torch.testing.assert_close(found.loss, value)
    torch.testing.assert_close(found.parameters["lora_B"], slopes["lora_B"], atol=1e-8, rtol=1e-4)
    frozen = rows(ALL, parameters())

    def loss_of_head(features: Tensor, given: Parameters) -> Tensor:
        return cross_entropy(features @ given["head"].T, LABELS)

    found = gradients(parameters(), lambda part, given: frozen[part], LENGTHS, CPU, loss_of_head)
    assert set(found.parameters) == {"head"}


@pytest.mark.parametrize("coupled", [True, False])
def test_the_same_bits_on_any_number_of_cores(coupled: bool, threads: Callable[[int], None]) -> None:
    results = []
    for number in (1, 2, 3):
        threads(number)
        given = (rows, LENGTHS, CPU, loss) if coupled else (by_item, LENGTHS, CPU)
        results.append(gradients(parameters(), *given))
        assert torch.get_num_threads() == number
    first, *others = results
    for other in others:
        assert torch.equal(first.loss, other.loss) and torch.equal(first.rows, other.rows)
        assert all(torch.equal(first.parameters[name], other.parameters[name]) for name in first.parameters)


def trained(epochs: int, lr: float = 0.5) -> tuple[dict[str, Tensor], list[float]]:
    given = parameters()
    optimiser = torch.optim.AdamW(given.values(), lr=lr / 100, weight_decay=0.1)

    def gradients_of(items: Tensor) -> Gradients:
        chosen = items.tolist()
        return gradients(
            given, lambda part, now: by_item([chosen[i] for i in part], now), [LENGTHS[i] for i in chosen], CPU
        )

    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.5)
    generator = torch.Generator().manual_seed(7)
    losses = [0.0] * epochs
    for step in train(
        given, gradients_of, optimiser, count=len(LENGTHS), epochs=epochs, batch=5, generator=generator,
        schedule=schedule,
    ):  # fmt: skip
        losses[step.epoch] += float(step.gradients.loss) * len(step.items) / len(LENGTHS)
    return given, losses


def test_torchs_own_loop() -> None:
    found, losses = trained(3)
    leaves = {name: tensor.requires_grad_() for name, tensor in parameters().items()}
    optimiser = torch.optim.AdamW(leaves.values(), lr=0.005, weight_decay=0.1)
    generator = torch.Generator().manual_seed(7)
    expected = []
    for _ in range(3):
        total = 0.0
        for chosen in torch.randperm(len(LENGTHS), generator=generator).split(5):  # type: ignore[no-untyped-call]
            optimiser.zero_grad()
            value = by_item(chosen.tolist(), leaves).mean()
            value.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += value.item() * len(chosen) / len(LENGTHS)
        expected.append(total)
        optimiser.param_groups[0]["lr"] /= 2
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[2] < losses[0] / 2
    for name, tensor in leaves.items():
        torch.testing.assert_close(found[name], tensor.detach(), atol=1e-4, rtol=1e-3)
    assert torch.equal(found["unused"], parameters()["unused"])  # no decay without a gradient


def test_a_rate_too_high() -> None:
    with pytest.raises(RunError, match="the loss is not finite") as caught:
        trained(5, lr=1e38)
    assert caught.value.hint == "give a smaller lr than 1e+36"
