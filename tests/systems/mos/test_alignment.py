"""Classifier alignment against scikit-learn, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mergebench.errors import RunError
from mergebench.systems.mos.alignment import align, draw
from mergebench.systems.mos.statistics import ClassStatistics, of_classes

WIDTH = 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def statistics(kind: str = "covariance", scale: float = 1.0) -> list[ClassStatistics]:
    """Three tasks of two overlapping classes."""
    random = generator(5)
    tasks = []
    for _ in range(3):
        labels = torch.arange(2).repeat_interleave(60)
        places = torch.randn(2, WIDTH, generator=random)
        mix = torch.eye(WIDTH) + torch.randn(WIDTH, WIDTH, generator=random) / 6
        rows = scale * (places[labels] + torch.randn(120, WIDTH, generator=random) @ mix)
        tasks.append(of_classes(rows, labels, ["a", "b"], kind, generator()))
    return tasks


def head() -> tuple[torch.Tensor, torch.Tensor]:
    random = generator(6)
    return torch.randn(6, WIDTH, generator=random), torch.randn(6, generator=random)


def test_draws_are_of_every_class_in_the_order_of_tasks() -> None:
    tasks = statistics()
    rows, classes = draw(tasks, 5000, generator())

    assert classes.tolist() == [one for one in range(6) for _ in range(5000)]
    means = torch.cat([task.mean for task in tasks])
    for one in range(6):
        torch.testing.assert_close(rows[classes == one].mean(0), means[one], atol=0.15, rtol=0)


@pytest.mark.parametrize("kind", ["covariance", "variance", "centroids"])
def test_a_head_is_aligned_as_well_as_scikit_learn_fits_one(kind: str) -> None:
    tasks = statistics(kind)
    held, answers = draw(tasks, 1000, generator(7))
    rows, classes = draw(tasks, 1000, generator(8))
    fitted = LogisticRegression(max_iter=1000).fit(rows.numpy(), classes.numpy())
    best = fitted.score(held.numpy(), answers.numpy())
    weight, bias = head()
    before = (held @ weight.T + bias).argmax(1).eq(answers).float().mean().item()
    weight, bias = align(weight, bias, tasks, epochs=60, lr=0.05, generator=generator())
    after = (held @ weight.T + bias).argmax(1).eq(answers).float().mean().item()

    assert before < 0.4 < 0.6 < best < 0.9
    assert after > best - 0.015


def test_only_the_head_moves_and_the_generator_decides_how() -> None:
    tasks, (weight, bias) = statistics(), head()
    kept = [tensor.clone() for task in tasks for tensor in task.tensors().values()]
    first, again = (align(weight, bias, tasks, epochs=2, generator=generator(1)) for _ in range(2))
    other = align(weight, bias, tasks, epochs=2, generator=generator(2))

    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(weight, head()[0]) and torch.equal(bias, head()[1])
    now = [tensor for task in tasks for tensor in task.tensors().values()]
    assert all(torch.equal(*pair) for pair in zip(kept, now, strict=True))
    assert not any(tensor.requires_grad for tensor in (*now, *first))


def test_epochs_are_so_many_steps_of_sgd_at_rates_of_a_cosine() -> None:
    tasks, (weight, bias) = statistics(), head()
    found = align(weight, bias, tasks, epochs=2, lr=0.1, batch=4, weight_decay=0.01, generator=generator(3))
    random = generator(3)
    theta = torch.cat([weight, bias[:, None]], 1).double()
    velocity = torch.zeros_like(theta)
    for rate in (0.1, 0.05):
        rows, classes = draw(tasks, 20, random)
        order = torch.randperm(120, generator=random)
        rows = torch.cat([rows, torch.ones(120, 1)], 1).double()
        for step in range(6):  # as many as classes
            part = order[20 * step : 20 * step + 20]
            error = (rows[part] @ theta.T).softmax(1)
            error[torch.arange(20), classes[part]] -= 1
            velocity = 0.9 * velocity + error.T @ rows[part] / 20 + 0.01 * theta
            theta = theta - rate * velocity

    torch.testing.assert_close(torch.cat([found[0], found[1][:, None]], 1).double(), theta, atol=1e-5, rtol=0)


def test_a_head_that_runs_away_is_told() -> None:
    with pytest.raises(RunError, match="no longer finite") as found:
        align(*head(), statistics(), lr=1e30, epochs=9, generator=generator())
    assert "1e+30" in (found.value.hint or "")
