"""Class statistics against NumPy and against their own draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mergebench.errors import RunError
from mergebench.systems.mos.bank import BankWriter, read_bank
from mergebench.systems.mos.statistics import ClassStatistics, of_classes
from tests.systems.mos.conftest import WIDTH, about, parts


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def items(width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features of two classes, 50 and 9 items, not in order."""
    random = generator(1)
    mix = torch.randn(width, width, generator=random)
    rows = torch.randn(59, width, generator=random) @ mix + 3 * torch.randn(width, generator=random)
    labels = torch.zeros(59, dtype=torch.int64)
    labels[torch.randperm(59, generator=random)[:9]] = 1
    return rows, labels


def test_mean_and_spread_are_numpys() -> None:
    rows, labels = items()
    full = of_classes(rows, labels, ["a", "b"], "covariance", generator())
    diagonal = of_classes(rows, labels, ["a", "b"], "variance", generator())

    assert full.count.tolist() == [50, 9]
    for number in (0, 1):
        own = rows[labels == number].double().numpy()
        np.testing.assert_allclose(full.mean[number], own.mean(0), atol=1e-5)
        np.testing.assert_allclose(full.spread[number], np.cov(own.T) + 1e-4 * np.eye(4), atol=1e-5)
        np.testing.assert_allclose(diagonal.spread[number], own.var(0, ddof=1) + 1e-4, atol=1e-5)


def test_draws_have_the_moments() -> None:
    rows, labels = items()
    number = 200_000
    for kind in ("covariance", "variance"):
        one = of_classes(rows, labels, ["a", "b"], kind, generator())
        drawn = one.draw(number, generator(2)).double()
        for sample, mean, spread in zip(drawn, one.mean.double(), one.spread.double(), strict=True):
            full = spread if kind == "covariance" else spread.diag()
            scale = full.diagonal().sqrt()
            assert ((sample.mean(0) - mean).abs() < 5 * scale / number**0.5).all()
            assert ((sample.T.cov() - full).abs() < 8 * scale[:, None] * scale / number**0.5).all()


def test_centroids_are_where_the_clusters_are_and_draws_come_from_all_alike() -> None:
    random = generator(3)
    places = 100 * torch.eye(10)
    sizes = [3 * number + 2 for number in range(10)]
    rows = torch.cat(
        [place + torch.randn(size, 10, generator=random) for place, size in zip(places, sizes, strict=True)]
    )
    one = of_classes(rows, torch.zeros(len(rows), dtype=torch.int64), ["a"], "centroids", generator())
    order = one.spread[0].argmax(1)

    assert sorted(order.tolist()) == list(range(10))
    for place, centroid, within in zip(order.tolist(), one.spread[0], one.within[0], strict=True):
        start = sum(sizes[:place])
        own = rows[start : start + sizes[place]].numpy()
        np.testing.assert_allclose(centroid, own.mean(0), atol=1e-4)
        np.testing.assert_allclose(within, own.var(0), atol=1e-4)
    drawn = one.draw(20_000, generator(4))[0]
    nearest = drawn.argmax(1)
    assert torch.bincount(nearest).sub(2000).abs().max() < 250  # of 20,000 over ten: a deviation of 42
    for place, centroid, within in zip(order, one.spread[0], one.within[0], strict=True):
        own = drawn[nearest == place]
        torch.testing.assert_close(own.mean(0), centroid, atol=0.15, rtol=0)
        torch.testing.assert_close(own.var(0), within + 1e-4, atol=0.15, rtol=0.15)


def test_clusters_of_one_item_are_left_out_unless_there_are_no_others() -> None:
    spread = torch.tensor([[[0.0, 0.0], [9.0, 9.0]], [[0.0, 0.0], [9.0, 9.0]]])
    within = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    one = ClassStatistics("centroids", torch.tensor([9, 2]), spread.mean(1), spread, within)
    first, second = one.draw(500, generator())

    assert first.abs().max() < 6
    assert set(second.round().flatten().tolist()) == {0.0, 9.0}
    assert second.sub(second.round()).std().item() == pytest.approx(0.01, rel=0.1)  # the root of 1e-4


@pytest.mark.parametrize("kind", ["covariance", "variance", "centroids"])
def test_tensors_say_all_and_a_generator_decides_the_rest(kind: str) -> None:
    rows, labels = items()
    one, again = (of_classes(rows, labels, ["a", "b"], kind, generator()) for _ in range(2))
    read = ClassStatistics.of_tensors(one.tensors())

    assert read.kind == kind
    assert torch.equal(read.draw(7, generator(1)), again.draw(7, generator(1)))
    assert all(tensor.shape[0] == 2 for tensor in one.tensors().values())


@pytest.mark.parametrize("kind", ["covariance", "variance", "centroids"])
def test_a_bank_keeps_them(kind: str, tmp_path: Path) -> None:
    rows, labels = items(WIDTH)
    one = of_classes(rows, labels, ["a", "b"], kind, generator())
    writer = BankWriter(tmp_path / "bank", about(statistics=kind))
    writer.add(["a", "b"], **parts(0, 2, 0, statistics=one.tensors()))
    read = ClassStatistics.of_tensors(read_bank(tmp_path / "bank").statistics(0))

    assert torch.equal(read.draw(3, generator(1)), one.draw(3, generator(1)))


def test_large_features_keep_a_covariance_that_can_be_drawn_from() -> None:
    rows = 1e4 * torch.randn(3, 64, generator=generator())  # rank 2, and 1e-4 is lost in float32 beside 1e8
    one = of_classes(rows, torch.zeros(3, dtype=torch.int64), ["a"], "covariance", generator())

    assert one.draw(10, generator()).isfinite().all()


def test_one_item_is_a_class_of_centroids() -> None:
    one = of_classes(torch.ones(1, 3), torch.tensor([0]), ["a"], "centroids", generator())

    torch.testing.assert_close(one.draw(100, generator())[0], torch.ones(100, 3), atol=0.06, rtol=0)


def test_classes_that_cannot_be_told_are_named() -> None:
    rows, labels = torch.ones(3, 2), torch.tensor([0, 0, 2])
    for kind in ("covariance", "centroids"):
        with pytest.raises(RunError, match="class 'b': it has no items"):
            of_classes(rows, labels, ["a", "b", "c"], kind, generator())
    for kind in ("covariance", "variance"):
        with pytest.raises(RunError, match=f"class 'b': it has 1 item, its {kind} takes at least 2") as found:
            of_classes(rows, labels.clamp(max=1), ["a", "b"], kind, generator())
        assert "centroids" in (found.value.hint or "")
    rows[1, 1] = torch.nan
    with pytest.raises(RunError, match="class 'a': its features are not finite"):
        of_classes(rows, labels.clamp(max=1), ["a", "b"], "centroids", generator())
    huge = 1e20 * torch.randn(3, 2, generator=generator())
    with pytest.raises(RunError, match="class 'a': its covariance is beyond float32"):
        of_classes(huge, torch.zeros(3, dtype=torch.int64), ["a"], "covariance", generator())
