"""PCB against the authors' code (recorded), the worked example, its identities and its corners."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mergebench.errors import RunError
from mergebench.methods.pcb import CLIP
from tests.methods.whole import whole

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import pcb_inputs

TAU = torch.tensor(
    [
        [0.10, -0.40, 0.05, 0.30, -0.20, 0.00, 0.60, -0.10, 0.25, -0.35, 0.15, 0.45],
        [0.20, 0.30, -0.05, 0.35, -0.10, 0.50, -0.20, 0.40, 0.00, -0.30, 0.12, 0.07],
    ]
)
pcb = partial(whole, "pcb", scope="model")


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("readme", [0, 0, 0, 0.35, 0, 0.40, 0.45, 0, 0, 0, 0, 0.45]),
        ("nlp", [0, 0, 0, 0.35, 0, 0.40, 0.45, 0, 0, 0, 0, 0.45]),
        ("vision", [0, 0, 0, 0.35, 0, 0.40, 0.45, 0, 0, 0, 0, 0.45]),
        ("vision-es", [0, 0, 0, 0.35, 0, 0.40, 0, 0, 0, -0.35, 0, 0.45]),
    ],
)
def test_the_worked_example(variant: str, expected: list[float]) -> None:
    torch.testing.assert_close(pcb(TAU, density=0.25, variant=variant), torch.tensor(expected))


def test_the_worked_example_with_a_lambda_for_each_task() -> None:
    merged = pcb(TAU, density=0.25, variant="vision-es", weight=(1.2, 0.9))

    expected = torch.tensor([0, 0, 0, 0.315, 0, 0.36, 0, 0, 0, -0.42, 0, 0.54])
    torch.testing.assert_close(merged, expected)


GOLDEN, ABOUT = pcb_inputs.load()
MERGED = [name for name in GOLDEN if not name.endswith("/kept")]


@pytest.mark.parametrize("name", MERGED)
def test_the_authors_code(name: str) -> None:
    case, variant = name.split("/")
    settings = pcb_inputs.CASES[case]
    tvs = torch.from_numpy(pcb_inputs.task_vectors(case))
    values: dict[str, Any] = {"density": settings[2]}
    if "@" in variant:
        variant, weights = variant.split("@")
        values["weight"] = tuple(float(weight) for weight in weights.split(","))

    merged = pcb(tvs, variant=variant, **values)

    expected = torch.as_tensor(GOLDEN[name])
    assert torch.equal(expected != 0, merged != 0)
    assert torch.linalg.norm(merged - expected) <= 1e-6 * torch.linalg.norm(expected)
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=2e-6 * float(tvs.abs().max()))


@pytest.mark.parametrize("variant", CLIP)
def test_one_task_alone_keeps_its_clipped_values(variant: str) -> None:
    tvs = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    merged = pcb(tvs, variant=variant, density=0.2)

    ordered = tvs[0].abs().sort().values
    low, high = ordered[int(1000 * CLIP[variant])], ordered[int(1000 * (1 - CLIP[variant]) - 1)]
    clipped = tvs[0].sign() * tvs[0].abs().clamp(low, high)
    kept = merged != 0
    assert 0 < int(kept.sum()) <= 200
    torch.testing.assert_close(merged[kept], clipped[kept])


@pytest.mark.parametrize("variant", CLIP)
def test_merged_values_lie_between_the_tasks(variant: str) -> None:
    tvs = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1)) * 1e-3
    merged = pcb(tvs, variant=variant, density=0.3)

    assert (merged.abs() <= tvs.abs().max(dim=0).values * (1 + 1e-5)).all()


@pytest.mark.parametrize("variant", CLIP)
def test_the_order_of_tasks_does_not_matter(variant: str) -> None:
    tvs = torch.randn(3, 2000, generator=torch.Generator().manual_seed(2)) * 1e-3

    torch.testing.assert_close(pcb(tvs, variant=variant), pcb(tvs[[2, 0, 1]], variant=variant), rtol=1e-5, atol=1e-9)


def test_lambda_and_equal_weights_scale_alike() -> None:
    tvs = torch.randn(3, 2000, generator=torch.Generator().manual_seed(3)) * 1e-3

    torch.testing.assert_close(pcb(tvs, weight=(1.3,) * 3), pcb(tvs, **{"lambda": 1.3}))


def test_a_zero_task_vector_is_refused_by_name() -> None:
    tvs = torch.stack([TAU[0], torch.zeros(12)])

    with pytest.raises(RunError, match="ft1: its task vector is zero"):
        pcb(tvs)


def test_a_zero_tensor_contributes_nothing_at_tensor_scope() -> None:
    tvs = torch.stack([TAU[0], torch.zeros(12)])

    assert torch.equal(pcb(TAU[:1], scope="tensor", density=0.25), pcb(tvs, scope="tensor", density=0.25))


@pytest.mark.parametrize("density", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 20])
@pytest.mark.parametrize("variant", CLIP)
def test_small_tensors_are_finite_and_keep_at_least_one(variant: str, size: int, density: float) -> None:
    tvs = torch.randn(2, size, generator=torch.Generator().manual_seed(size))
    merged = pcb(tvs, scope="tensor", density=density, variant=variant)

    assert torch.isfinite(merged).all()
    assert size <= 2 or (merged != 0).any()


@pytest.mark.parametrize("variant", CLIP)
def test_a_constant_task_vector_is_finite(variant: str) -> None:
    tvs = torch.stack([torch.full((50,), 0.01), torch.linspace(-0.1, 0.1, 50)])

    assert torch.isfinite(pcb(tvs, variant=variant)).all()
