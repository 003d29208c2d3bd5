"""The statistics of a merge against brute force on the tensors, and against what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import mergebench
from mergebench.engine.noise import TILE
from mergebench.evaluation.page import profile as module
from mergebench.evaluation.page.profile import Profile, profile
from mergebench.recipe.resolve import resolve
from tests.models import fine_tuned, read_model, tiny_tensors, write_model, write_recipe

Tensors = dict[str, torch.Tensor]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """A merge that was done, its profile, and the task vectors by tensor [models, elements]."""

    profile: Profile
    vectors: dict[str, Array]
    written: dict[str, Array]
    out: Path


Merged = Callable[..., Case]


@pytest.fixture
def merged(tmp_path: Path) -> Merged:
    def run(method: str, base: Tensors, models: list[Tensors], **more: Any) -> Case:
        write_model(tmp_path / "base", base)
        places = [write_model(tmp_path / f"m{number}", one) for number, one in enumerate(models)]
        entries = more.pop("entries", places)
        recipe = mergebench.load(write_recipe(tmp_path / "r.yaml", method, entries, tmp_path / "base", **more))
        result = mergebench.run(mergebench.plan(recipe), tmp_path / "out")
        answers = json.loads(json.dumps(result.provenance["answers"]))  # as they are read from the file
        found = profile(resolve(recipe), answers)
        assert found is not None
        names = [name for name, value in base.items() if value.is_floating_point()]
        flat = {name: [(one[name] - base[name]).flatten().double().numpy() for one in models] for name in names}
        stored = read_model(tmp_path / "out")
        is_vector = (tmp_path / "out" / "tasks").exists()
        written = {n: (stored[n] - (0 if is_vector else base[n])).flatten().double().numpy() for n in names}
        return Case(found, {name: np.stack(rows) for name, rows in flat.items()}, written, tmp_path / "out")

    return run


def models_of(count: int, seed: int = 0) -> tuple[Tensors, list[Tensors]]:
    base = tiny_tensors(seed)
    return base, [fine_tuned(base, seed + 1 + number, 0.05 * (1 + number)) for number in range(count)]


def apart(count: int) -> tuple[Tensors, list[Tensors]]:
    """Models no two of which change the same element: what a merge keeps of each can be seen in what it wrote."""
    base, models = models_of(count)
    for name in base:
        owner = torch.arange(base[name].numel()).reshape(base[name].shape) % count
        for number, model in enumerate(models):
            model[name] = torch.where(owner == number, model[name], base[name])
    return base, models


def kept(case: Case) -> dict[str, tuple[int, ...]]:
    return {name: counts.kept for name, counts in case.profile.counts.items()}


def test_norms_and_conflicts(merged: Merged) -> None:
    base, models = models_of(3)
    models[0]["layers.0.bias"][:3] = base["layers.0.bias"][:3]
    models[1]["layers.0.bias"] = base["layers.0.bias"]
    case = merged("task_arithmetic", base, models, parameters={"lambda": 0.4})
    assert case.profile.models == ("m0", "m1", "m2")
    assert case.profile.counts.keys() == case.vectors.keys()
    for name, vectors in case.vectors.items():
        found = case.profile.counts[name]
        changed = (vectors != 0).sum(0) >= 2
        opposed = [(v > 0).any() and (v < 0).any() for v in vectors.T]
        assert found.elements == case.profile.numel[name] == vectors.shape[1]
        assert found.squares == pytest.approx((vectors**2).sum(1), rel=1e-6)
        assert (found.shared, found.conflicts) == (changed.sum(), sum(opposed))
        assert found.merged == pytest.approx((case.written[name] ** 2).sum(), rel=1e-4)


def test_kept_by_ties(merged: Merged) -> None:
    """Trimmed away, or outvoted: lost. Golden by the paper's words."""
    base, models = models_of(3)
    case = merged("ties", base, models, parameters={"density": 0.4})
    for name, vectors in case.vectors.items():
        k = max(int(vectors.shape[1] * 0.4), 1)
        trimmed = np.stack([np.where(abs(row) >= np.sort(abs(row))[-k], row, 0) for row in vectors])
        elected = np.where(trimmed.sum(0) >= 0, 1, -1)
        assert kept(case)[name] == tuple((trimmed * elected > 0).sum(1)), name


@pytest.mark.parametrize("variant", ["readme", "vision"])
def test_kept_by_pcb(merged: Merged, variant: str) -> None:
    """Of d elements of a model, those whose score is above the floor: the paper's share of the model's own elements."""
    base, models = models_of(3)
    case = merged("pcb", base, models, parameters={"density": 0.3, "variant": variant})
    whole = np.concatenate([*case.vectors.values()], axis=1)
    d = whole.shape[1]
    clip = 1e-4 if variant == "readme" else 0.01
    size = np.sort(abs(whole), axis=1)
    low, high = size[:, [int(d * clip)]], size[:, [max(int(d * (1 - clip) - 1), 0)]]
    norm = (np.clip(abs(whole), low, high) - low) / (high - low)
    signed = np.sign(whole) * norm
    across = whole * whole.sum(0) if variant == "readme" else whole * signed.sum(0)
    score = np.exp(3 * norm**2) * np.tanh(across)
    survives = score > np.sort(score, axis=1)[:, [int(d * 0.7)]]
    start = 0
    for name, vectors in case.vectors.items():
        own = survives[:, start : start + vectors.shape[1]]
        assert kept(case)[name] == tuple(own.sum(1)), name
        start += vectors.shape[1]
    assert np.sum([*kept(case).values()], axis=0) == pytest.approx(0.3 * d, abs=2)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("dare_linear", {"density": 0.5}),
        ("dare_ties", {"density": 0.5}),
        ("della_linear", {"density": 0.5}),
        ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
        ("task_arithmetic", {"weight": 0.5}),
        ("localize_stitch", {"density": 0.2}),
        ("magmax", {}),
        ("ram", {}),
        ("sce", {"select_topk": 0.4}),
    ],
)
def test_kept_is_what_is_there(merged: Merged, method: str, parameters: dict[str, Any]) -> None:
    """Where models change different elements, what is kept of each is what was written at its own."""
    base, models = apart(2)
    case = merged(method, base, models, parameters=parameters)
    for name, vectors in case.vectors.items():
        assert kept(case)[name] == tuple(((row != 0) & (case.written[name] != 0)).sum() for row in vectors), name
    assert any(0 < sum(counts) for counts in kept(case).values())


def test_kept_among_equals(merged: Merged) -> None:
    """A mean of equal values does not change with a weight; they are kept all the same."""
    base, (model,) = models_of(1)
    case = merged("ties", base, [model, model, model])
    for name, vectors in case.vectors.items():
        assert kept(case)[name] == tuple((vectors != 0).sum(1)), name


def test_kept_by_masks(merged: Merged) -> None:
    base, models = models_of(3)
    case = merged("emr", base, models)
    for name, vectors in case.vectors.items():
        sign = np.sign(vectors.astype(np.float32).sum(0))
        assert kept(case)[name] == tuple((vectors * sign > 0).sum(1)), name


def test_a_model_without_weight_is_lost(merged: Merged, tmp_path: Path) -> None:
    base, models = models_of(2)
    entries = [
        {"model": str(tmp_path / f"m{number}"), "parameters": {"weight": weight}}
        for number, weight in enumerate([0.0, 1.0])
    ]
    case = merged("task_arithmetic", base, models, entries=entries)
    numel = case.profile.numel
    assert kept(case) == {name: (0, numel[name]) for name in numel}


def test_what_is_asked_of_all(merged: Merged) -> None:
    """LiNeS' last question is about all tensors: the replay has that answer too, or the merged norms were others."""
    base, models = models_of(2)
    case = merged("ties", base, models, parameters={"density": 0.5}, lines={"alpha": "auto", "beta": 0.5})
    for name, written in case.written.items():
        assert case.profile.counts[name].merged == pytest.approx((written**2).sum(), rel=1e-4)


def test_methods_on_weights_are_not_replayed(merged: Merged) -> None:
    """And a base that counts among the models is none of those shown."""
    base, models = models_of(2)
    case = merged("karcher", base, models)
    assert not case.profile.replayed
    assert case.profile.models == ("m0", "m1")
    for name, vectors in case.vectors.items():
        assert case.profile.counts[name].squares == pytest.approx((vectors**2).sum(1), rel=1e-6)


def test_without_a_base(tmp_path: Path) -> None:
    _, models = models_of(2)
    places = [write_model(tmp_path / f"m{number}", one) for number, one in enumerate(models)]
    assert profile(resolve(mergebench.load(write_recipe(tmp_path / "r.yaml", "linear", places))), {}) is None


def test_large_models_are_sampled(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 3 * TILE)
    chunk, numel = 2 * TILE, 9 * TILE + 5
    random = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(numel, generator=random)}
    case = merged("task_arithmetic", base, [fine_tuned(base, seed) for seed in (1, 2)])
    every = case.profile.every
    assert every == 4
    seen = np.concatenate([case.vectors["w"][:, at : at + chunk] for at in range(0, numel, chunk * every)], axis=1)
    assert case.profile.counts["w"].elements == seen.shape[1]
    assert case.profile.counts["w"].squares == pytest.approx((seen**2).sum(1))
    assert case.profile.counts["w"].kept == tuple((seen != 0).sum(1))


def test_saved_and_read(merged: Merged) -> None:
    base, models = models_of(2)
    case = merged("ties", base, models)
    case.profile.save(case.out)
    again = Profile.load(case.out)
    assert again.counts.keys() == case.profile.counts.keys()
    one, other = case.profile.counts["norm.weight"], case.profile.counts["embed.weight"]
    assert again.counts["norm.weight"] + again.counts["embed.weight"] == one + other
    assert (again.models, again.every, again.numel) == (case.profile.models, 1, case.profile.numel)
