"""DELLA: who is kept, how often, and that the mean is the task vector.

python -m pytest tests/methods/test_della.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mergebench import methods
from mergebench.engine.context import Context
from mergebench.engine.span import Span
from mergebench.errors import RecipeError
from tests.methods.test_by_hand import elect_by_hand
from tests.methods.whole import whole

ROWS, COLUMNS = 6, 2000


def della(tvs: Tensor, name: str = "della_linear", seed: int = 0, **values: Any) -> Tensor:
    """What the method makes of task vectors [models, rows, columns]."""
    method, shape = methods.get(name), tuple(tvs.shape[1:])
    given = {}
    for parameter in method.parameters.values():
        value = values.get(parameter.name, parameter.default)
        given[parameter.name] = (value,) * len(tvs) if parameter.per_model and not isinstance(value, tuple) else value
    numel = tvs[0].numel()
    labels = tuple(f"ft{number}" for number in range(len(tvs)))
    context = Context(numel, labels, (Span("w", 0, numel),), shape, "tensor", seed, torch.device("cpu"))
    merged: Tensor = method(tvs.reshape(len(tvs), -1), method.make_params(given), context)
    return merged.reshape(shape)


def shuffled(seed: int) -> Tensor:
    """One model; each row holds the magnitudes 1 to COLUMNS, times a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(COLUMNS, generator=generator) + 1.0 for _ in range(ROWS)])
    signs = torch.randint(0, 2, (ROWS, COLUMNS), generator=generator) * 2.0 - 1
    return (ranks * signs * torch.logspace(-4, 1, ROWS).unsqueeze(1)).unsqueeze(0)


def shares_of(tv: Tensor, density: float, epsilon: float) -> Tensor:
    """From density - epsilon for the smallest of a row to density + epsilon for the largest."""
    ranks = tv.abs().argsort(dim=1).argsort(dim=1)
    return density - epsilon + 2 * epsilon * ranks / (tv.shape[1] - 1)


@pytest.mark.parametrize(("density", "epsilon"), [(0.3, 0.15), (0.5, 0.4), (0.85, 0.15)])
def test_each_row_keeps_its_share_and_large_elements_more_often(density: float, epsilon: float) -> None:
    tvs = shuffled(0)
    kept = (della(tvs, density=density, epsilon=epsilon) != 0).float()
    shares = shares_of(tvs[0], density, epsilon)

    for row, share in zip(kept, shares, strict=True):
        error = (share * (1 - share)).sum().sqrt() / COLUMNS
        assert abs(row.mean() - density) < 4 * error
        for third in share.argsort().split(COLUMNS // 3):
            expected = share[third]
            error = (expected * (1 - expected)).sum().sqrt() / len(third)
            assert abs(row[third].mean() - expected.mean()) < 4.5 * error


def test_what_is_kept_is_divided_by_its_own_share() -> None:
    tvs = shuffled(1)
    shares = shares_of(tvs[0], 0.4, 0.2)

    rescaled, plain = della(tvs, density=0.4, epsilon=0.2), della(tvs, density=0.4, epsilon=0.2, rescale=False)

    assert torch.equal(rescaled != 0, plain != 0)
    torch.testing.assert_close(rescaled, torch.where(rescaled != 0, tvs[0] / shares, 0.0))
    torch.testing.assert_close(plain, torch.where(rescaled != 0, tvs[0], 0.0))


def test_the_mean_over_seeds_is_the_task_vector() -> None:
    tvs, seeds = shuffled(2)[:, :, :200], 400
    shares = shares_of(tvs[0], 0.3, 0.15)

    mean = sum(della(tvs, seed=seed, density=0.3) for seed in range(seeds)) / seeds

    errors = tvs[0].abs() * ((1 - shares) / shares / seeds).sqrt()
    away = ((mean - tvs[0]) / errors).flatten()
    assert abs(float(away.square().mean()) - 1) < 0.2  # a chi-squared of 1200
    assert float(away.abs().max()) < 5.5


def test_seeds_and_models_draw_noise_of_their_own() -> None:
    tvs = shuffled(3).repeat(2, 1, 1)

    one, again, other = (della(tvs[:1], seed=seed, density=0.5) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert 0.3 < float(((one != 0) == (other != 0)).float().mean()) < 0.7
    assert not torch.equal(2 * one, della(tvs, seed=1, density=0.5))


def test_without_epsilon_it_is_dare() -> None:
    row = torch.randn(2, 3000, generator=torch.Generator().manual_seed(4))

    torch.testing.assert_close(
        whole("dare_linear", row, density=(0.3, 1.0)), whole("della_linear", row, density=(0.3, 1.0), epsilon=0.0)
    )


def test_signs_are_elected_among_what_is_kept() -> None:
    tvs = torch.randint(-4, 5, (3, 1, 40), generator=torch.Generator().manual_seed(5)).float()
    kept = [della(tvs[model : model + 1], density=1.0)[0] for model in range(3)]
    assert torch.equal(torch.stack(kept), tvs[:, 0])

    values: dict[str, Any] = {"density": (1.0, 1.0, 1e-5), "epsilon": 0.0}  # the last model is as good as dropped
    for normalize in (True, False):
        expected = elect_by_hand([*tvs[:2, 0].tolist(), [0.0] * 40], (1, 1, 1), normalize)
        torch.testing.assert_close(della(tvs, "della", normalize=normalize, **values)[0], torch.tensor(expected))
    assert methods.get("della").parameters["normalize"].default is True


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.15, 0.15), (0.9, 0.15)])
def test_shares_that_are_none_are_refused(density: float, epsilon: float) -> None:
    with pytest.raises(RecipeError, match=r"parameters.epsilon: 0.15 reaches below 0 or above 1 around density"):
        della(shuffled(0), density=density, epsilon=epsilon)


def test_rows_of_one_element_are_kept_as_often_as_the_density_says() -> None:
    tvs = torch.ones(1, 20_000, 1)

    kept = della(tvs, density=0.3)

    assert abs(float((kept != 0).float().mean()) - 0.3) < 0.015
    torch.testing.assert_close(kept[kept != 0].unique(), torch.tensor([1 / 0.3]))
