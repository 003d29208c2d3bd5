"""A subspace drawn from a seed: scipy's Hadamard matrices and normal distribution are the oracles."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from scipy.linalg import hadamard
from scipy.special import ndtri
from torch import Tensor

from mergebench.deltas import subspace as module
from mergebench.deltas.subspace import (
    BLOCK,
    Subspace,
    draw,
    fastfood,
    length,
    normal,
    permuted,
    prepared,
    scaled,
    subspace,
    transformed,
)

SHAPE = (96, 128)
NUMBERS = [406075802, 846175383, 1799769033, -175284844]
NORMALS = ["0x1.e9ffa00000000p-3", "0x1.081bac0000000p-1", "0x1.660e180000000p+0", "-0x1.a3c0d20000000p-4"]
ORDER = [0, 4, 3, 1, 2, 7, 6, 5]
BITS = "86f47c40776229fe"


def drawn(theta: Tensor, shape: tuple[int, ...] = SHAPE, name: str = "w", seed: int = 0, **settings: str) -> Subspace:
    return prepared(Subspace(theta, name, seed, **settings), shape)  # type: ignore[arg-type]


def change(p: Subspace, theta: Tensor | None = None) -> Tensor:
    return subspace(p if theta is None else replace(p, theta=theta), slice(None), None)


def matrix(p: Subspace) -> Tensor:
    """P [D, d] of small tensors, by matrices."""
    assert p.order is not None and p.gains is not None and p.signs is not None
    n, used = len(p.gains), len(p.signs)
    full = torch.from_numpy(hadamard(n)).double()
    gathered = full[p.order.long()]  # rows of H: beyond m they repeat on the columns that theta fills
    out: Tensor = full @ (p.gains.double()[:, None] * gathered[:, :used] * p.signs.double())
    return out[: p.rows * p.columns]


@pytest.mark.parametrize("n", [1, 2, 4, 8, 32, 1024])
def test_the_transform_is_hadamards_matrix(n: int) -> None:
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    assert torch.allclose(transformed(x), torch.from_numpy(hadamard(n)).double() @ x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("n", [BLOCK, 8 * BLOCK])
def test_a_long_transform_is_its_own_inverse_and_of_whole_numbers_exact(n: int) -> None:
    x = torch.randint(-9, 9, (n,), generator=torch.Generator().manual_seed(0)).double()
    once = transformed(x)
    assert torch.equal(transformed(once), n * x)
    for row in (0, 1, n // 2 + 5, n - 1):  # (-1)^(bits that row and column share)
        signs = torch.tensor([1 - 2 * ((row & column).bit_count() % 2) for column in range(n)])
        assert once[row] == (signs * x).sum()


def test_golden() -> None:
    assert transformed(torch.tensor([1.0, 2, 3, 4])).tolist() == [10, -2, -4, 0]
    theta, order = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([2, 0, 3, 1]) % 2
    gains = scaled(torch.tensor([0.5, -1, 2, 1]), 3)
    out = fastfood(theta, torch.tensor([1.0, -1.0]), order, gains)[:3]
    assert out.tolist() == pytest.approx([2.1939311, 0.3464102, -1.9629910], rel=1e-6)


def test_the_numbers_of_a_seed_never_change() -> None:
    numbers = draw("0\0w\0normal", 0, 4)
    assert numbers.tolist() == NUMBERS
    assert [value.hex() for value in normal(numbers).tolist()] == NORMALS
    assert permuted("0\0w\0order", 0, 8, 8).tolist() == ORDER
    theta = torch.arange(1, 301) / 64
    bits = change(drawn(theta, (200, 300))).numpy().tobytes()
    assert hashlib.sha256(bits).hexdigest()[:16] == BITS


def test_another_process_with_another_number_of_threads_has_the_same_bits() -> None:
    code = (
        "import torch, hashlib; torch.set_num_threads(2)\n"
        "from mergebench.deltas.subspace import *\n"
        "p = prepared(Subspace(torch.arange(1, 301) / 64, 'w', 0), (200, 300))\n"
        "print(hashlib.sha256(subspace(p, slice(None), None).numpy().tobytes()).hexdigest()[:16])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == BITS


def test_normal_numbers_are_those_of_the_inverse_distribution() -> None:
    ends = torch.tensor([-(2**31), 2**31 - 1, -1, 0], dtype=torch.int32)
    numbers = torch.cat([draw("1\0a", 0, BLOCK), draw("1\0a", BLOCK, BLOCK), ends])
    expected = ndtri((numbers.numpy().astype("f8") + 0.5) / 2**32 + 0.5)
    assert normal(numbers).numpy() == pytest.approx(expected, rel=4e-7)
    some = normal(numbers[:-4]).double()
    assert abs(float(some.mean())) < 4 / math.sqrt(len(some)) and abs(float(some.var()) - 1) < 0.03


@pytest.mark.parametrize("n", [1, 2, 4, 64, 2 * BLOCK])
def test_the_permutation_has_every_number_once(n: int) -> None:
    step = min(n, BLOCK)
    found = torch.cat([permuted("a", start, step, n) for start in range(0, n, step)])
    assert torch.equal(found.sort().values, torch.arange(n, dtype=torch.int32))


@pytest.mark.parametrize(("shape", "d"), [((5, 7), 11), ((8, 8), 64), ((3,), 500), ((1,), 1), ((16, 16, 3), 100)])
def test_the_change_is_that_of_matrices(shape: tuple[int, ...], d: int) -> None:
    theta = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    p = drawn(theta, shape)
    expected = matrix(p) @ theta[: len(p.signs)] if p.signs is not None else theta
    assert torch.allclose(change(p).reshape(-1), expected, rtol=1e-12, atol=1e-12)


def test_small_tensors_see_the_first_numbers_alone() -> None:
    theta = torch.randn(500, generator=torch.Generator().manual_seed(0))
    p = drawn(theta, (3,))
    assert p.signs is not None and len(p.signs) == 4
    other = theta.clone()
    other[4:] = 0
    assert torch.equal(change(p), change(p, other))


def test_smaller_subspaces_lie_in_larger_ones() -> None:
    theta = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    larger = torch.cat([theta, theta.new_zeros(700)])
    assert torch.allclose(change(drawn(theta)), change(drawn(larger)), atol=1e-12)


def test_the_gradient_is_the_transpose() -> None:
    random = torch.Generator().manual_seed(0)
    theta = torch.randn(300, dtype=torch.float64, generator=random).requires_grad_()
    weights = torch.randn(SHAPE, dtype=torch.float64, generator=random)
    out = change(drawn(theta.detach()), theta)
    (slope,) = torch.autograd.grad(out, theta, weights)
    left, right = float((out * weights).sum().detach()), float(theta.detach() @ slope)
    assert left == pytest.approx(right, rel=1e-10)
    p = drawn(theta.detach()[:9], (5, 4))
    assert torch.autograd.gradcheck(lambda one: change(p, one), (theta[:9],))


@pytest.mark.parametrize("shape", [(96, 128), (5, 4)])
def test_the_authors_gradient_is_a_share_of_it(shape: tuple[int, int]) -> None:
    theta = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    slopes, outs = [], []
    for gradient in ("exact", "fairseq"):
        out = change(drawn(theta.detach(), shape, gradient=gradient), theta)
        slopes += torch.autograd.grad(out.sin().sum(), theta)
        outs.append(out)
    assert torch.equal(*outs)
    assert torch.allclose(slopes[1] * length(math.prod(shape)), slopes[0], rtol=1e-12)


def test_the_norm_is_that_of_theta_on_average() -> None:
    theta = torch.randn(64, generator=torch.Generator().manual_seed(0))
    for shape in ((64, 64), (96, 128), (1000,)):
        shares = torch.stack([change(drawn(theta, shape, seed=seed)).norm() / theta.norm() for seed in range(40)])
        assert abs(float(shares.square().mean()) - 1) < 0.06, shape


def test_the_columns_are_nearly_orthonormal() -> None:
    p = drawn(torch.zeros(256), (96, 128))
    columns = torch.stack([change(p, one).reshape(-1) for one in torch.eye(256)])
    gram = columns @ columns.T
    apart = gram[~torch.eye(256, dtype=torch.bool)]
    # random vectors of 12,288 elements have 0.009; a tail of G's fourth power makes it a little more
    assert abs(float(gram.diag().mean()) - 1) < 0.02 and float(apart.square().mean().sqrt()) < 0.016


def test_seed_and_name_draw_another_subspace() -> None:
    theta = torch.randn(50, generator=torch.Generator().manual_seed(0))
    one = change(drawn(theta)).reshape(-1)
    for other in (drawn(theta, name="v"), drawn(theta, seed=1)):
        assert abs(float(torch.nn.functional.cosine_similarity(one, change(other).reshape(-1), dim=0))) < 0.1


def test_zeros_change_no_bit() -> None:
    base = torch.tensor([[0.0, -0.0, 1.5, -2.0]])
    out = base + change(drawn(torch.zeros(3), (1, 4)))
    assert torch.equal(out.view(torch.int32), base.view(torch.int32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient": "other"}, "exact or fairseq"),
        ({"scale": math.inf}, "a scale of inf"),
        ({"seed": "a"}, "no whole number"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    fields = {"name": "w", "seed": 0, "scale": 1.0, "gradient": "exact"} | settings
    with pytest.raises(ValueError, match=message):
        module.subspace.check({"theta": (4,)}, fields, (3, 3))  # type: ignore[misc]


def test_no_tensor_is_larger_than_the_permutation() -> None:
    fields = {"name": "w", "seed": 0, "scale": 1.0, "gradient": "exact"}
    with pytest.raises(ValueError, match="2\\^31"):
        subspace.check({"theta": (4,)}, fields, (2**16, 2**16))  # type: ignore[misc]
