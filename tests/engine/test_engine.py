"""The engine on real files: misses, many tensors, noise, tied tensors, the memory it says it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergebench
from mergebench.engine import brackets, statistics, sweep
from mergebench.engine.noise import TILE, bernoulli
from mergebench.engine.run import Result
from mergebench.engine.span import Span

CPU = torch.device("cpu")


def files(folder: Path, shapes: dict[str, tuple[int, ...]], models: int = 2) -> tuple[dict[str, Tensor], list[Any]]:
    """A base and fine-tunes as files, and their tensors."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned = [
        {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        for _ in range(models)
    ]
    for name, tensors in zip(["base", "ft0", "ft1", "ft2"], [base, *tuned], strict=False):
        save_file(tensors, folder / f"{name}.safetensors")
    return base, tuned


def merge(folder: Path, out: str, method: str = "ties", models: int = 2, plan: Any = None, **more: Any) -> Result:
    recipe = mergebench.load(
        {
            "merge_method": method,
            "base_model": str(folder / "base.safetensors"),
            "models": [{"model": str(folder / f"ft{number}.safetensors")} for number in range(models)],
            **more,
        }
    )
    return mergebench.run(mergebench.plan(recipe, **(plan or {})), folder / out)


def test_a_bracket_that_misses_costs_a_sweep_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, {"w": (5 * TILE,)})
    right = merge(tmp_path, "right", parameters={"density": 0.2})

    def poisoned(sample: Any, row: int, rank: int, numel: int) -> tuple[float, float, float, tuple[float, ...]]:
        return (10.0, 11.0, 12.0, ()) if sample.margin == 1 else honest(sample, row, rank, numel)

    honest = brackets.Sample.bracket
    monkeypatch.setattr(brackets.Sample, "bracket", poisoned)
    missed = merge(tmp_path, "missed", parameters={"density": 0.2})

    assert (0, 1) == (right.provenance["extra_sweeps"], missed.provenance["extra_sweeps"])
    assert torch.equal(
        load_file(right.out / "model.safetensors")["w"], load_file(missed.out / "model.safetensors")["w"]
    )


def test_global_ties_trims_over_all_tensors(tmp_path: Path) -> None:
    base, tuned = files(tmp_path, {"a": (3, 70_000), "b": (41,), "c": (), "d": (TILE + 1,)})
    tuned[0]["b"] += 1  # far larger than the others: all of it is kept
    save_file(tuned[0], tmp_path / "ft0.safetensors")
    density = 0.3

    out = merge(tmp_path, "out", models=1, scope="model", parameters={"density": density}).out

    flat = torch.cat([(tuned[0][name] - base[name]).reshape(-1) for name in base])
    threshold = flat.abs().sort(descending=True).values[int(density * len(flat)) - 1]
    merged = load_file(out / "model.safetensors")
    for name in base:
        vector = tuned[0][name] - base[name]
        expected = base[name] + torch.where(vector.abs() >= threshold, vector, 0.0)
        assert torch.equal(expected, merged[name])


@pytest.mark.parametrize(
    ("density", "threshold", "kept"), [(0.25, 1.0, 5), (0.5, 1.0, 5), (0.125, 2.0, 2), (1.0, None, 8)]
)
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_what_ties_keeps_is_reported(
    tmp_path: Path, density: float, threshold: float | None, kept: int, scope: str
) -> None:
    """Everything at or above the threshold: with equal values, more than the density."""
    save_file({"w": torch.zeros(8)}, tmp_path / "base.safetensors")
    values = [1.0, 1, 1, 2, 2, 0, 0, 0] if density == 0.125 else [1.0, 1, 1, 1, 2, 0, 0, 0]
    save_file({"w": torch.tensor(values)}, tmp_path / "ft0.safetensors")

    done = merge(tmp_path, "out", models=1, scope=scope, parameters={"density": density})

    if threshold is None:
        assert (done.provenance["answers"], done.provenance["kept"]) == ({}, {})
        return
    (answer,) = done.provenance["answers"]["w" if scope == "tensor" else "model"]
    assert {"order_statistics": [[threshold]], "kept": [kept / 8]} == answer
    assert done.provenance["kept"] == {"ft0": kept / 8}
    assert kept == np.count_nonzero(load_file(done.out / "model.safetensors")["w"])


def test_what_lies_between_two_thresholds_is_reported(tmp_path: Path) -> None:
    """Breadcrumbs drops from both ends; what equals a threshold stays."""
    save_file({"w": torch.zeros(10)}, tmp_path / "base.safetensors")
    save_file({"w": torch.tensor([9.0, 8, 7, 6, 5, 5, 4, 3, 2, 1])}, tmp_path / "ft0.safetensors")

    done = merge(tmp_path, "out", "breadcrumbs", models=1, parameters={"density": 0.3, "gamma": 0.2})

    (answer,) = done.provenance["answers"]["w"]
    assert {"order_statistics": [[5.0], [7.0]], "kept": [0.4]} == answer
    assert [0, 0, 7, 6, 5, 5, 0, 0, 0, 0] == load_file(done.out / "model.safetensors")["w"].tolist()


def test_noise_does_not_depend_on_the_borders_of_chunks() -> None:
    whole = bernoulli(3, [Span("w", 0, TILE + 100)], [0.3, 0.8], CPU)
    starts = range(0, TILE + 100, 7777)
    pieces = [bernoulli(3, [Span("w", at, min(at + 7777, TILE + 100))], [0.3, 0.8], CPU) for at in starts]

    assert torch.equal(whole, torch.cat(pieces, dim=1))


def test_noise_with_a_share_for_each_element() -> None:
    """The draws of `bernoulli(share)`, held against each element's own: 0 is never drawn, 1 always is."""
    span = Span("w", 100, TILE + 300)
    shares = torch.rand(2, span.numel, generator=torch.Generator().manual_seed(0))
    shares[:, ::5], shares[:, 1::5] = 0.0, 1.0

    drawn = bernoulli(3, [span], shares, CPU)

    assert not drawn[:, ::5].any()
    assert drawn[:, 1::5].all()
    for share in (0.25, 0.75):
        never, always = shares < share, shares > share
        constant = bernoulli(3, [span], [share] * 2, CPU)
        assert not (drawn & never & ~constant).any()
        assert not (constant & always & ~drawn).any()
    left, right = Span("w", 100, 7777), Span("w", 7777, TILE + 300)
    pieces = [
        bernoulli(3, [left], shares[:, : left.numel], CPU),
        bernoulli(3, [right], shares[:, left.numel :], CPU),
    ]
    assert torch.equal(drawn, torch.cat(pieces, dim=1))
    assert torch.equal(drawn, bernoulli(3, [left, right], shares, CPU))


def test_noise_is_fair_and_independent() -> None:
    size, share = 4 * TILE, 0.3
    draws = bernoulli(0, [Span("w", 0, size)], [share] * 2, CPU).float()
    others = [bernoulli(seed, [Span(name, 0, size)], [share], CPU)[0].float() for seed, name in ((1, "w"), (0, "v"))]
    error = (share * (1 - share) / size) ** 0.5

    assert set(draws.unique().tolist()) == {0.0, 1.0}
    for row in (*draws, *others):
        assert abs(float(row.mean()) - share) < 5 * error
        neighbours = float((row[1:] * row[:-1]).mean())
        assert abs(neighbours - share**2) < 5 * (share**2 / size) ** 0.5
    for other in (draws[1], *others):
        both = float((draws[0] * other).mean())
        assert abs(both - share**2) < 5 * (share**2 / size) ** 0.5
    assert torch.equal(torch.ones(1, 9, dtype=torch.bool), bernoulli(0, [Span("w", 0, 9)], [1.0], CPU))


def test_dare_keeps_the_mean(tmp_path: Path) -> None:
    base, tuned = files(tmp_path, {"w": (20 * TILE,)}, models=1)
    tuned[0]["w"] = base["w"] + 1
    save_file(tuned[0], tmp_path / "ft0.safetensors")

    merged = load_file(merge(tmp_path, "out", "dare_linear", 1, parameters={"density": 0.25}).out / "model.safetensors")

    change = (merged["w"] - base["w"]).double()
    assert {0.0, 4.0} == set(np.unique(np.round(change.numpy(), 3)).tolist())
    assert abs(float(change.mean()) - 1) < 5 * (3 / (20 * TILE)) ** 0.5


@pytest.mark.parametrize("workers", [1, 3])
def test_what_a_sample_tells_little_about_is_gathered_whole(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of very different size, as in low-rank differences: pieces of them are a bad sample. The same bits."""
    base, tuned = files(tmp_path, dict.fromkeys("abcdef", (5 * TILE // 2,)))
    for number, tensors in enumerate(tuned):
        for name, value in tensors.items():
            rows = torch.exp(3 * torch.randn(160, 1, generator=torch.Generator().manual_seed(number)))
            step = (value - base[name]).view(160, -1) * rows
            tensors[name] = base[name] + step.reshape(-1)
        save_file(tensors, tmp_path / f"ft{number}.safetensors")
    made: list[int] = []
    init = statistics.Small.__init__

    def counted(self: statistics.Small, numel: int, *more: Any) -> None:
        made.append(numel)
        init(self, numel, *more)

    monkeypatch.setattr(statistics.Small, "__init__", counted)
    whole = merge(tmp_path, "whole", "ties", plan={"workers": workers}, parameters={"density": 0.3})
    assert made.count(5 * TILE // 2) >= 6
    assert whole.provenance["extra_sweeps"] == 0
    monkeypatch.setattr(sweep.Sweeper, "_is_small", lambda self, unit: False)
    made.clear()
    bracketed = merge(tmp_path, "bracketed", "ties", plan={"workers": workers}, parameters={"density": 0.3})
    assert 5 * TILE // 2 not in made
    left, right = (load_file(result.out / "model.safetensors") for result in (whole, bracketed))
    assert all(torch.equal(left[name], right[name]) for name in left)
    for number, one in enumerate(tuned):
        change = (one["a"] - base["a"]).abs().sort().values
        (thresholds,) = whole.provenance["answers"]["a"][0]["order_statistics"]
        assert thresholds[number] == change[len(change) - int(len(change) * 0.3)].item()


def test_the_answer_does_not_depend_on_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, {"a": (6 * TILE,), "b": (5 * TILE,)})
    monkeypatch.setattr(sweep.Sweeper, "_is_small", lambda self, unit: False)
    generous = merge(tmp_path, "generous", "pcb", plan={"memory": 400 << 20})
    tight = merge(tmp_path, "tight", "pcb", plan={"memory": 32 << 20, "workers": 1})

    left, right = (load_file(result.out / "model.safetensors") for result in (generous, tight))
    assert all(torch.equal(left[name], right[name]) for name in left)
