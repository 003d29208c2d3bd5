"""Adapter merging in both semantics: golden scalars, identities, the published loop itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergebench.systems.mos.merging import in_pass, mean_of, merging_of

DEPTH = 12
BLOCKS = [f"layer.{number}" for number in range(DEPTH)]
PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


def adapter(fill: float | torch.Generator) -> dict[str, Tensor]:
    shapes = ((2, 3), (2,), (3, 2), (3,))
    one = {}
    for block in BLOCKS:
        for part, shape in zip(PARTS, shapes, strict=True):
            random = isinstance(fill, torch.Generator)
            one[f"{block}.{part}"] = torch.randn(shape, generator=fill) if random else torch.full(shape, fill)
    return one


def value(one: dict[str, Tensor]) -> float:
    """Of an adapter that holds one number all over."""
    values = torch.cat([tensor.flatten() for tensor in one.values()])
    assert values.min() == values.max()
    return values[0].item()


def merged(semantics: str, forwards: int, steps: int, *before: float) -> float:
    live = adapter(1.0)
    merging = merging_of(semantics, mean_of([adapter(one) for one in before]), 0.1, BLOCKS)
    for _ in range(forwards):
        merging.forward(live)
    for _ in range(steps):
        merging.step(live)
    return value(live)


def test_golden_scalars() -> None:
    assert merged("paper", 1, 1, 0.0) == pytest.approx(0.9, abs=1e-7)
    assert merged("reference", 1, 0, 0.0) == pytest.approx(0.2824295, abs=1e-7)
    assert merged("reference", 1, 1, 0.0) == pytest.approx(0.2541866, abs=1e-7)
    assert merged("reference", 4, 0, 0.0) == pytest.approx(0.0063627, abs=1e-7)
    assert merged("paper", 0, 1, 0.0, 0.5) == pytest.approx(0.925, abs=1e-7)


@pytest.mark.parametrize("semantics", ["paper", "reference"])
def test_the_first_adapter_never_changes(semantics: str) -> None:
    assert merged(semantics, 3, 3) == 1.0


@pytest.mark.parametrize("semantics", ["paper", "reference"])
def test_alpha_zero_changes_no_bit_and_a_fixed_point_stays(semantics: str) -> None:
    random = torch.Generator().manual_seed(0)
    live, mean = adapter(random), adapter(random)
    kept = {name: tensor.clone() for name, tensor in live.items()}
    for target, alpha in ((mean, 0.0), (kept, 0.1)):
        merging = merging_of(semantics, target, alpha, BLOCKS)
        used = merging.forward(live)
        merging.step(live)
        for name, tensor in kept.items():
            assert torch.equal(live[name], tensor) and torch.equal(used[name], tensor)


def test_the_reference_merges_all_layers_once_a_block_and_computes_with_what_a_block_finds() -> None:
    random = torch.Generator().manual_seed(1)
    live, mean = adapter(random), adapter(random)
    literal = {name: tensor.double() for name, tensor in live.items()}
    merging = merging_of("reference", mean, 0.1, BLOCKS)
    for forwards in range(3):
        before = {name: tensor.clone() for name, tensor in live.items()}
        used = merging.forward(live)
        for block in BLOCKS:
            literal = {name: 0.9 * tensor + 0.1 * mean[name] for name, tensor in literal.items()}
            for part in PARTS:
                torch.testing.assert_close(
                    used[f"{block}.{part}"].double(), literal[f"{block}.{part}"], atol=1e-6, rtol=0
                )
        for name, tensor in literal.items():
            torch.testing.assert_close(live[name].double(), tensor, atol=1e-6, rtol=0)
        again = in_pass(before, mean, 0.1, BLOCKS, 0)
        assert all(torch.equal(again[name], tensor) for name, tensor in used.items()), forwards


def test_passes_before_a_pass_are_told_by_their_number() -> None:
    random = torch.Generator().manual_seed(2)
    live, mean = adapter(random), adapter(random)
    stored = {name: tensor.clone() for name, tensor in live.items()}
    merging = merging_of("reference", mean, 0.1, BLOCKS)
    for before in range(4):
        used, told = merging.forward(live), in_pass(stored, mean, 0.1, BLOCKS, before)
        for name, tensor in used.items():
            torch.testing.assert_close(told[name], tensor, atol=1e-6, rtol=0)


def test_the_merge_is_affine() -> None:
    random = torch.Generator().manual_seed(3)
    one, two, mean = adapter(random), adapter(random), adapter(random)
    both = {name: 0.3 * tensor + 0.7 * two[name] for name, tensor in one.items()}
    merging = merging_of("paper", mean, 0.1, BLOCKS)
    for live in (one, two, both):
        merging.step(live)
    for name, tensor in both.items():
        torch.testing.assert_close(tensor, 0.3 * one[name] + 0.7 * two[name], atol=1e-6, rtol=0)


def test_the_mean_is_of_all_before() -> None:
    assert mean_of([]) is None
    assert value(mean_of([adapter(0.0), adapter(0.5), adapter(4.0)]) or {}) == 1.5


def test_the_optimiser_changes_what_the_merges_of_its_pass_left() -> None:
    live = {name: tensor.requires_grad_() for name, tensor in adapter(1.0).items()}
    optimiser = torch.optim.SGD(live.values(), lr=0.5, weight_decay=0.2)
    merging = merging_of("reference", adapter(0.0), 0.1, BLOCKS)
    used = {name: tensor.detach().requires_grad_() for name, tensor in merging.forward(live).items()}
    sum(tensor.sum() for tensor in used.values()).backward()
    for name, tensor in used.items():
        live[name].grad = tensor.grad
    optimiser.step()
    merging.step(live)

    assert value({n: t.detach() for n, t in live.items()}) == pytest.approx(0.9 * (0.9**12 * (1 - 0.1) - 0.5), abs=1e-6)
