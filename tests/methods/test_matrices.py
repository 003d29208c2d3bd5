"""The methods on matrices against their formulas in NumPy's float64, and against their identities.

python -m pytest tests/methods/test_matrices.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergebench.deltas.svd import nearest_orthogonal
from mergebench.deltas.svd import svd as significant
from mergebench.methods._matrices import is_matrix
from tests.methods.whole import whole

Floats = NDArray[np.float64]
METHODS: dict[str, dict[str, Any]] = {
    "tsv_m": {},
    "iso_c": {},
    "iso_cts": {},
    "knots": {},
    "knots/task_arithmetic": {"combine": "task_arithmetic"},
    "wudi": {},
    "wudi/closed": {"solve": "closed"},
}
SHAPES = [(24, 24), (40, 15), (12, 33), (5, 70)]


pytestmark = pytest.mark.usefixtures("one_thread")


def task_matrices(models: int, shape: Sequence[int], scale: float = 0.01, seed: int = 0) -> Tensor:
    return torch.randn(models, *shape, generator=torch.Generator().manual_seed(seed)) * scale


def merged(name: str, stack: Tensor, tensor: str = "w", **values: Any) -> Tensor:
    values = METHODS[name] | values
    rows = stack.reshape(len(stack), -1)
    found = whole(name.split("/")[0], rows, name=tensor, shape=tuple(stack.shape[1:]), **values)
    return found.view(stack.shape[1:])


def close(found: Tensor, expected: Floats, tolerance: float = 2e-5) -> None:
    """Equal, measured by the norm of the expected matrix."""
    distance = np.linalg.norm(found.double().numpy() - expected)
    assert distance <= tolerance * max(np.linalg.norm(expected), 1e-12)


# -- the formulas ----------------------------------------------------------------------------------


def svd(matrix: Floats) -> tuple[Floats, Floats, Floats]:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return u, s, v


def polar(matrix: Floats) -> Floats:
    """By Newton's iteration on the square factor of a QR decomposition: no singular values in it."""
    if matrix.shape[0] < matrix.shape[1]:
        return polar(matrix.T).T
    q, x = np.linalg.qr(matrix)
    for _ in range(60):
        x = (x + np.linalg.inv(x).T) / 2
    return q @ x


def tsv_m(taus: Floats) -> Floats:
    k = min(taus.shape[1:]) // len(taus)
    parts = [svd(tau) for tau in taus]
    left = polar(np.hstack([u[:, :k] for u, _, _ in parts]))
    right = polar(np.vstack([v[:k] for _, _, v in parts]))
    return left @ np.diag(np.concatenate([s[:k] for _, s, _ in parts])) @ right


def iso_c(taus: Floats) -> Floats:
    summed = taus.sum(0)
    nuclear = np.trace(np.linalg.pinv(polar(summed)) @ summed)
    return polar(summed) * nuclear / min(summed.shape)


def iso_cts(taus: Floats, fraction: float = 0.8) -> Floats:
    n, r = len(taus), min(taus.shape[1:])
    each = round((r - int(r * fraction)) / n)
    k = r - n * each
    u, s, v = svd(taus.sum(0))
    parts = [(u[:, :k], s[:k], v[:k])]
    outside = np.eye(len(u)) - u[:, :k] @ u[:, :k].T
    for tau in taus:
        a, b, c = svd(outside @ tau)
        parts.append((a[:, :each], b[:each], c[:each]))
    flat = np.mean(np.concatenate([part[1] for part in parts]))
    return flat * polar(np.hstack([part[0] for part in parts])) @ polar(np.vstack([part[2] for part in parts]))


def knots(taus: Floats, density: float, combine: str = "ties") -> Floats:
    n = taus.shape[2]
    u, s, v = svd(np.hstack(list(taus)))
    kept = s > 1e-5
    aligned = [np.diag(s[kept]) @ v[kept, i * n : (i + 1) * n] for i in range(len(taus))]
    if combine == "task_arithmetic":
        return u[:, kept] @ sum(aligned)
    result = np.zeros(aligned[0].shape)
    trimmed = []
    for matrix in aligned:
        size = max(int(matrix.size * density), 1)
        trimmed.append(np.where(np.abs(matrix) >= np.sort(np.abs(matrix), axis=None)[-size], matrix, 0))
    for place in np.ndindex(*result.shape):
        votes = [matrix[place] for matrix in trimmed]
        sign = 1 if sum(votes) >= 0 else -1
        agree = [vote for vote in votes if vote * sign > 0]
        result[place] = sum(agree) / max(len(agree), 1)
    return u[:, kept] @ result


def disturbance(tau: Tensor, stack: Tensor) -> Tensor:
    """What WUDI minimises, as its paper writes it."""
    terms = [((tau - one) @ one.T).square().sum() / one.square().sum() for one in stack]
    return torch.stack(terms).sum()


CASES = [(models, shape) for models in (2, 3, 5) for shape in SHAPES]


@pytest.mark.parametrize(("models", "shape"), CASES)
def test_formulas(models: int, shape: tuple[int, int]) -> None:
    stack = task_matrices(models, shape)
    taus = stack.double().numpy()

    close(merged("tsv_m", stack), tsv_m(taus))
    close(merged("tsv_m", stack, **{"lambda": 0.5}), tsv_m(taus) / 2)
    close(merged("iso_c", stack, **{"lambda": 1.5}), 1.5 * iso_c(taus))
    close(merged("knots/task_arithmetic", stack), knots(taus, 1.0, "task_arithmetic"))
    for density in (0.2, 0.7, 1.0):
        close(merged("knots", stack, density=density), knots(taus, density))
    for fraction in (0.8, 0.5):
        found = merged("iso_cts", stack, common_space_fraction=fraction)
        close(found, iso_cts(taus, fraction), 1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1e-2])
@pytest.mark.parametrize(("models", "shape"), [(2, (24, 24)), (3, (40, 15)), (4, (6, 33))])
def test_wudi_is_adam_on_the_disturbance(models: int, shape: tuple[int, int], scale: float) -> None:
    stack = task_matrices(models, shape, scale)
    tau = stack.sum(0).requires_grad_()
    optimizer = torch.optim.Adam([tau], lr=1e-5)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = disturbance(tau, stack)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        optimizer.step()

    found = merged("wudi", stack)

    moved = (tau.detach() - stack.sum(0)).norm()
    assert (found - tau.detach()).norm() < 1e-3 * moved
    assert disturbance(found, stack) < losses[0]
    assert torch.equal(stack.sum(0), merged("wudi", stack, steps=0))


@pytest.mark.parametrize(("models", "shape"), CASES)
def test_wudi_closed_is_stationary(models: int, shape: tuple[int, int]) -> None:
    stack = task_matrices(models, shape)
    taus = stack.double().numpy()
    found = merged("wudi/closed", stack)

    gradients = []
    for point in (found, stack.sum(0)):
        tau = point.double().requires_grad_()
        disturbance(tau, stack.double()).backward()  # type: ignore[no-untyped-call]
        assert tau.grad is not None
        gradients.append(tau.grad.norm())
    assert gradients[0] < 1e-5 * gradients[1]
    grams = [tau.T @ tau / np.sum(tau**2) for tau in taus]
    total = sum(tau @ gram for tau, gram in zip(taus, grams, strict=True))
    close(found, total @ np.linalg.pinv(sum(grams), rcond=1e-12))


def test_how_far_adam_stops_before_the_stationary_point_depends_on_the_scale() -> None:
    distances = []
    for scale in (1e-3, 1e-2):
        stack = task_matrices(4, (48, 48), scale)
        closed = merged("wudi/closed", stack)
        distances.append(((merged("wudi", stack) - closed).norm() / closed.norm()).item())

    assert distances[0] < 0.9 * distances[1]


# -- identities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tsv_m", "knots/task_arithmetic", "wudi/closed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_model_is_itself(name: str, shape: tuple[int, int]) -> None:
    stack = task_matrices(1, shape)

    close(merged(name, stack), stack[0].double().numpy(), 5e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_makes_all_singular_values_equal(shape: tuple[int, int]) -> None:
    stack = task_matrices(3, shape)
    values = torch.linalg.svdvals(merged("iso_c", stack).double())
    assert values.max() / values.min() < 1 + 1e-5
    sums = torch.linalg.svdvals(stack.sum(0).double())
    torch.testing.assert_close(values.sum(), sums.sum(), rtol=1e-5, atol=0)
    one = torch.linalg.svdvals(merged("iso_cts", stack[:1]).double())
    assert one.max() / one.min() < 1 + 1e-4


def test_iso_cts_with_nothing_but_common_space_is_iso_c() -> None:
    stack = task_matrices(3, (12, 30))

    close(merged("iso_cts", stack, common_space_fraction=1.0), merged("iso_c", stack).double().numpy())


def test_what_a_task_has_outside_of_the_common_space_may_be_nothing() -> None:
    """Then no direction is made of the rounding that is left."""
    left, _ = torch.linalg.qr(task_matrices(1, (20, 20), seed=1)[0])
    right, _ = torch.linalg.qr(task_matrices(1, (30, 20), seed=2)[0])
    inside = 5 * torch.outer(left[:, 0], right[:, 0])
    found = merged("iso_cts", torch.stack([left * torch.arange(30.0, 10, -1) @ right.T, inside]))

    values = torch.linalg.svdvals(found.double())
    assert (values > 0.01).sum() == 18
    close(found, values[0].item() * (left[:, :18] @ right[:, :18].T).double().numpy(), 1e-4)


@pytest.mark.parametrize("name", ["wudi", "wudi/closed"])
def test_wudi_at_the_end_of_float32(name: str) -> None:
    """Norms beyond float32; tasks on columns of their own do not disturb each other, so they are added."""
    stack = torch.zeros(2, 8, 6)
    stack[0, :, :3] = 3e38 * task_matrices(1, (8, 3))[0].sign()
    stack[1, :, 3:] = 3e38 * task_matrices(1, (8, 3))[0].sign()

    close(merged(name, stack) / 3e38, (stack.sum(0) / 3e38).double().numpy(), 1e-6)


def test_wudi_closed_keeps_weak_directions() -> None:
    stack = task_matrices(1, (20, 12), 1.0)
    stack[0, :, 3] *= 1e-4

    close(merged("wudi/closed", stack)[:, 3], stack[0, :, 3].double().numpy(), 2e-2)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(24, 24), (40, 15), (12, 33)])
def test_the_order_of_models_does_not_matter(name: str, shape: tuple[int, int]) -> None:
    stack = task_matrices(4, shape)

    close(merged(name, stack[[2, 0, 3, 1]]), merged(name, stack).double().numpy(), 1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_equal_models(name: str) -> None:
    """What is stacked twice spans nothing new; the result of the formula is then its limit."""
    tau = task_matrices(1, (20, 12))
    found = merged(name, tau.repeat(3, 1, 1)).double().numpy()
    u, s, v = svd(tau[0].double().numpy())
    expected = {
        "tsv_m": u[:, :4] * s[:4] @ v[:4],
        "iso_c": 3 * s.mean() * u @ v,
        "knots/task_arithmetic": 3 * u * s @ v,
        "wudi/closed": u * s @ v,
    }
    assert np.isfinite(found).all()
    if name in expected:
        close(torch.from_numpy(found), expected[name], 1e-4)


@pytest.mark.parametrize("shape", [(24, 24), (40, 15), (12, 33)])
def test_orthogonal_tasks_of_rank_one_are_kept_as_they_are(shape: tuple[int, int]) -> None:
    left, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(shape[0], 4)))
    right, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(shape[1], 4)))
    taus = np.stack([size * np.outer(left[:, i], right[:, i]) for i, size in enumerate((3.0, 0.5, 2.0, 1.0))])
    stack = torch.tensor(taus, dtype=torch.float32)

    close(merged("tsv_m", stack), taus.sum(0), 1e-6)
    close(merged("wudi/closed", stack), taus.sum(0), 1e-6)
    close(merged("iso_c", stack), 6.5 / 4 * left @ right.T, 1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("zeros", [[0], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize("shape", [(24, 24), (40, 15), (12, 33), (1, 7), (7, 1), (2, 2)])
def test_task_matrices_of_zeros(name: str, zeros: list[int], shape: tuple[int, int]) -> None:
    stack = task_matrices(3, shape)
    stack[zeros] = 0
    found = merged(name, stack)
    assert torch.isfinite(found).all()
    if len(zeros) == 3:
        assert not found.any()
    elif name == "wudi/closed":  # a model that is the base has no say
        others = [i for i in range(3) if i not in zeros]
        close(found, merged(name, stack[others]).double().numpy(), 1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_extreme_scales(name: str, scale: float) -> None:
    assert torch.isfinite(merged(name, task_matrices(3, (9, 6), scale))).all()


def test_more_models_than_directions() -> None:
    """One triplet of each is kept, where floor(min(m, n) / N) would be none."""
    stack = task_matrices(5, (3, 8))

    assert merged("tsv_m", stack).norm() > 0


def test_knots_drops_what_is_negligible() -> None:
    stack = torch.zeros(2, 3, 4)
    stack[0, 0, 0], stack[0, 1, 1], stack[1, 2, 2] = 5e-6, 2e-5, 1e-2
    expected = stack.sum(0)
    expected[0, 0] = 0

    for combine in ("ties", "task_arithmetic"):
        close(merged("knots", stack, combine=combine), expected.double().numpy(), 1e-6)
        assert not merged("knots", stack * 1e-4, combine=combine).any()


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_decomposition_that_does_not_converge(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = task_matrices(3, shape)
    expected = merged(name, stack)

    def fails(matrix: Tensor, full_matrices: bool) -> Any:
        raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.linalg, "svd", fails)
    close(merged(name, stack), expected.double().numpy(), 1e-4)


def test_many_equal_singular_values() -> None:
    """What LAPACK's divide and conquer gave up on."""
    basis, _ = torch.linalg.qr(task_matrices(1, (600, 200))[0])
    stacked = torch.cat([basis, basis, basis], dim=1)
    expected = stacked.double().numpy() / 3**0.5

    close(nearest_orthogonal(stacked), expected, 1e-5)
    u, s, v = significant(stacked)
    assert len(s) == 200
    close((u * s) @ v, stacked.double().numpy(), 1e-5)


# -- which tensors ---------------------------------------------------------------------------------

MATRICES = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.3.mlp.shared_expert.down_proj.weight",
    "transformer.h.1.attn.c_attn.weight",
    "bert.encoder.layer.0.attention.output.dense.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "decoder.layers.0.multihead_attn.out_proj.weight",
]
AVERAGED = [
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "bert.embeddings.word_embeddings.weight",
    "shared.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "gpt_neox.embed_out.weight",
    "positional_embedding",
    "lm_head.weight",
    "lm_head.dense.weight",
    "heads.head.weight",
    "classifier.dense.weight",
    "pre_classifier.weight",
    "score.weight",
    "qa_outputs.weight",
    "cls.predictions.transform.dense.weight",
    "vocab_projector.weight",
    "output.weight",
    "text_projection",
]


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_matrix_is_averaged(name: str) -> None:
    assert all(is_matrix(tensor, (3, 4)) for tensor in MATRICES)
    assert not any(is_matrix(tensor, (3, 4)) for tensor in AVERAGED)
    for tensor, shape in [("layers.0.bias", (12,)), ("conv.weight", (2, 3, 2, 1)), ("lm_head.weight", (4, 3))]:
        stack = task_matrices(3, shape)
        found = merged(name, stack, tensor, **{"lambda": 0.5})
        torch.testing.assert_close(found, stack.mean(0) / 2)
