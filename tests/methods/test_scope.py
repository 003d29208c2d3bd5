"""`scope: model`: a threshold over all tensors at once, held against brute force on the concatenated vector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import mergebench
from mergebench.engine.noise import TILE

Rows = NDArray[np.float64]
SHAPES = {"a.weight": (3, TILE // 2), "b.bias": (61,), "c.weight": (300, 41), "d.scale": ()}
SIZES = {"base": 1.0, "ft0": 0.01, "ft1": 0.02, "ft2": 0.005}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes whose changes are ten times larger in one tensor than in the next."""
    place, base = tmp_path_factory.mktemp("models"), {}
    for number, (model, size) in enumerate(SIZES.items()):
        random = torch.Generator().manual_seed(number)
        tensors = {
            name: base.get(name, 0)
            + size * (1 if model == "base" else 10.0**-depth) * torch.randn(shape, generator=random)
            for depth, (name, shape) in enumerate(SHAPES.items())
        }
        base = base or tensors
        save_file(tensors, place / f"{model}.safetensors")
    return place


def flat(file: Path) -> NDArray[np.float32]:
    tensors = load_file(file)
    return np.concatenate([tensors[name].numpy().reshape(-1) for name in SHAPES])


def merged(
    folder: Path, out: Path, method: str, scope: str, chunk: int = TILE, **parameters: Any
) -> NDArray[np.float32]:
    recipe = mergebench.load(
        {
            "merge_method": method,
            "base_model": str(folder / "base.safetensors"),
            "models": [{"model": str(folder / f"ft{number}.safetensors")} for number in range(3)],
            "parameters": parameters,
            "scope": scope,
        }
    )
    mergebench.run(mergebench.plan(recipe, chunk=chunk, workers=2), out, overwrite=True)
    return flat(out / "model.safetensors")


def largest(values: Rows, count: int) -> Rows:
    """One where a value is among the `count` largest of its row."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    mask = np.zeros_like(values)
    np.put_along_axis(mask, order, 1, axis=1)
    return mask


def elected(tau: Rows, average: bool) -> Rows:
    agree = (np.sign(tau) == np.where(tau.sum(0) < 0, -1, 1)) & (tau != 0)
    return (tau * agree).sum(0) / (np.maximum(agree.sum(0), 1) if average else 1)


def ties(tau: Rows) -> Rows:
    return elected(tau * largest(abs(tau), int(tau.shape[1] * 0.2)), average=True)


def crumbs(tau: Rows) -> Rows:
    d = tau.shape[1]
    return tau * (largest(abs(tau), int(0.05 * d) + int(0.3 * d)) - largest(abs(tau), int(0.05 * d)))


def stitch(tau: Rows) -> Rows:
    mask = largest(abs(tau), int(tau.shape[1] * 0.1))
    return (tau * mask).sum(0) / np.maximum(mask.sum(0), 1)


def sce(tau: Rows) -> Rows:
    tau = tau * largest(tau.var(axis=0)[None], int(tau.shape[1] * 0.3))
    share = (tau**2).sum(1, keepdims=True) / (tau**2).sum()
    agree = np.sign(tau) == np.where(tau.sum(0) < 0, -1, 1)
    return (share * tau * agree).sum(0) / np.maximum((share * agree).sum(0), 1e-300)


def pcb(tau: Rows) -> Rows:
    n, d = tau.shape
    size = np.sort(abs(tau), axis=1)
    low, high = size[:, int(d * 1e-4), None], size[:, int(d * (1 - 1e-4) - 1), None]
    magnitude = abs(tau).clip(low, high)
    scaled = (magnitude - low) / (high - low)
    score = np.exp(n * scaled**2) * np.tanh(tau * tau.sum(0))
    order = np.sort(score, axis=1)
    floor, top = order[:, min(int(d * 0.9), d - 2), None], order[:, -1:]
    share = (score.clip(floor) - floor) / (top - floor)
    return (np.sign(tau) * magnitude * share).sum(0) / share.sum(0).clip(1e-12)


ORACLES: dict[str, tuple[dict[str, Any], Callable[[Rows], Rows]]] = {
    "ties": ({"density": 0.2}, ties),
    "breadcrumbs": ({"density": 0.3, "gamma": 0.05}, lambda tau: crumbs(tau).sum(0)),
    "breadcrumbs_ties": ({"density": 0.3, "gamma": 0.05}, lambda tau: elected(crumbs(tau), average=False)),
    "localize_stitch": ({"density": 0.1}, stitch),
    "sce": ({"select_topk": 0.3}, sce),
    "pcb": ({"density": 0.1}, pcb),
}


@pytest.mark.parametrize("method", ORACLES)
def test_the_threshold_is_that_of_the_concatenated_vector(folder: Path, tmp_path: Path, method: str) -> None:
    parameters, oracle = ORACLES[method]
    base = flat(folder / "base.safetensors")
    tau = np.stack([flat(folder / f"ft{number}.safetensors") - base for number in range(3)])
    want = base + oracle(tau.astype(np.float64))

    got = merged(folder, tmp_path / "model", method, "model", **parameters)

    assert np.abs(got - want).max() < 3e-7
    by_tensor = merged(folder, tmp_path / "tensor", method, "tensor", **parameters)
    assert (np.abs(by_tensor - want) > 1e-5).mean() > 0.01  # where each tensor has a threshold of its own


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "magmax", "consensus_ta"])
def test_what_each_element_decides_is_the_same_at_both_scopes(folder: Path, tmp_path: Path, method: str) -> None:
    """An element is dropped at random, or for its own sake: there is no threshold to reach over anything."""
    given = {"density": 0.4} if method.startswith("dare") else {}
    one, other = (merged(folder, tmp_path / scope, method, scope, **given) for scope in ("tensor", "model"))

    assert np.array_equal(one, other)
    assert not np.array_equal(one, flat(folder / "base.safetensors"))
