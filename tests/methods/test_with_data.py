"""Methods that read statistics, against their formulas written out, least squares, and what changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mergebench import methods
from mergebench.engine.context import Context, OnData
from mergebench.engine.span import Span
from mergebench.recipe import load

NAME = "encoder.layer.0.dense.weight"


def run(method: str, values: Tensor, on_data: OnData | None, **given: Any) -> Tensor:
    """The method on one whole tensor [models, ...]."""
    known, shape = methods.get(method), tuple(values.shape[1:])
    count, numel = len(values), values[0].numel()
    settings = {}
    for name, parameter in known.parameters.items():
        value = given.get(name, parameter.default)
        settings[name] = (value,) * count if parameter.per_model and not isinstance(value, tuple) else value
    names = tuple(f"m{number}" for number in range(count))
    spans, cpu = (Span(NAME, 0, numel),), torch.device("cpu")
    context = Context(numel, names, spans, shape, "tensor", 0, cpu, on_data)
    result: Tensor = known(values.reshape(count, -1), known.make_params(settings), context)
    return result.view(shape)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalize", [True, False])
def test_fisher_is_the_weighted_average(normalize: bool) -> None:
    values, fisher, scale = noise(3, 7, 5), noise(3, 7, 5, seed=1).square(), torch.tensor([2.0, 30.0, 0.5])
    fisher *= scale[:, None, None]
    norms, weight = tuple(fisher.flatten(1).norm(dim=1).tolist()), (0.2, 0.5, 0.3)
    got = run("fisher", values, OnData(fisher.flatten(1), norms), weight=weight, normalize=normalize, floor=1e-12)
    # with the coefficients 1 / |F_i|, scaled to add up to one, as published code applies them
    shares = 1 / torch.tensor(norms, dtype=torch.float64) if normalize else torch.ones(3, dtype=torch.float64)
    shares = shares / shares.sum() * torch.tensor(weight, dtype=torch.float64)
    each = shares[:, None, None] * fisher.double()
    want = (each * values.double()).sum(0) / each.sum(0)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_without_any_fisher_information_an_element_is_averaged() -> None:
    values, fisher = noise(2, 6), torch.tensor([[0.0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    got = run("fisher", values, OnData(fisher, (1.0, 0.0)))
    torch.testing.assert_close(got[:3], values[:, :3].mean(0))
    torch.testing.assert_close(got[3:], values[0, 3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["regmean", "regmean_plusplus"])
@pytest.mark.parametrize("first", [False, True])
def test_regmean_is_its_closed_form(method: str, first: bool) -> None:
    weights = [noise(9, 6, seed=seed) for seed in range(3)]  # [inputs, outputs]
    grams = [one.T @ one / 40 for one in (noise(40, 9, seed=seed) for seed in (5, 6, 7))]
    stored = torch.stack(weights if first else [one.T for one in weights])
    got = run(method, stored, OnData(torch.stack(grams), (1.0,) * 3, first), alpha=0.7)
    scaled = [0.7 * one.double() + 0.3 * torch.diag(one.diagonal()).double() for one in grams]
    right = sum(gram @ one.double() for gram, one in zip(scaled, weights, strict=True))
    want = torch.linalg.inv(torch.stack(scaled).sum(0)) @ right
    torch.testing.assert_close(got.double(), want if first else want.T, rtol=1e-5, atol=1e-5)


def squares(inputs: list[Tensor], weights: list[Tensor], merged: Tensor) -> float:
    """sum |X_i W - X_i W_i|^2"""
    pairs = zip(inputs, weights, strict=True)
    return sum(float((x.double() @ (merged - one).double()).square().sum()) for x, one in pairs)


def test_regmean_minimises_what_its_paper_says() -> None:
    inputs = [noise(30 + seed, 8, seed=seed) for seed in range(3)]
    weights = [noise(8, 5, seed=10 + seed) for seed in range(3)]
    grams = torch.stack([x.T @ x for x in inputs])
    got = run("regmean", torch.stack([one.T for one in weights]), OnData(grams, (1.0,) * 3), alpha=1.0).T
    targets = torch.cat([x @ one for x, one in zip(inputs, weights, strict=True)])
    want = torch.linalg.lstsq(torch.cat(inputs).double(), targets.double()).solution
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert squares(inputs, weights, got) < squares(inputs, weights, torch.stack(weights).mean(0))


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_inputs_that_no_text_has(alpha: float) -> None:
    """Fewer tokens than inputs, one input always zero: still a minimum, and that input's weights are averaged."""
    inputs = [noise(3, 12, seed=seed) for seed in range(2)]
    for x in inputs:
        x[:, 4] = 0
    weights = [noise(12, 5, seed=10 + seed) for seed in range(2)]
    grams = torch.stack([x.T @ x for x in inputs])
    got = run("regmean", torch.stack([one.T for one in weights]), OnData(grams, (1.0,) * 2), alpha=alpha).T
    mean = torch.stack(weights).mean(0)
    torch.testing.assert_close(got[4], mean[4])
    assert got.isfinite().all() and got.abs().max() < 10
    if alpha == 1:
        assert squares(inputs, weights, got) < 1e-6 * squares(inputs, weights, mean)  # 6 tokens, 11 inputs: it can


def test_equal_statistics_give_the_average() -> None:
    values, x = noise(4, 6, 8), noise(20, 8, seed=3)
    mean, norms = values.mean(0), (1.0,) * 4
    grams, fisher = (x.T @ x).expand(4, -1, -1), noise(48, seed=4).square().expand(4, -1)
    torch.testing.assert_close(run("regmean", values, OnData(grams, norms)), mean)
    torch.testing.assert_close(run("fisher", values, OnData(fisher, norms)), mean)
    torch.testing.assert_close(run("regmean", values, None), mean)  # no linear layer


def test_adamerging_adds_the_task_vectors_with_its_factors() -> None:
    values, factors = noise(2, 3, 4), torch.tensor([0.25, 0.75])
    got = run("adamerging", values, OnData(factors[:, None].expand(2, 12), (0.0, 0.0)))
    torch.testing.assert_close(got, 0.25 * values[0] + 0.75 * values[1])


def test_regmean_plusplus_as_the_paper_spells_it() -> None:
    recipe = load({"merge_method": "regmean++", "models": [{"model": one, "data": "x.jsonl"} for one in ("a", "b")]})
    assert recipe.merge_method == "regmean_plusplus"
