"""Methods that take a matrix whole: what comes whole, what it needs, and the same bits whoever does it.

python -m pytest tests/engine/test_whole_tensors.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import fine_tuned, write_model
from safetensors.torch import load_file
from torch import Tensor

import mergebench
from mergebench.engine import executors
from mergebench.engine.items import chunks_of
from mergebench.engine.noise import TILE
from mergebench.engine.plan import Plan
from mergebench.errors import RecipeError

MB = 10**6
SHAPES = {
    "model.embed_tokens.weight": (3000, 96),
    "model.layers.0.q.weight": (96, 96),
    "model.layers.0.up.weight": (200, 96),
    "model.layers.0.down.weight": (96, 200),
    "model.layers.0.norm.weight": (96,),
    "lm_head.weight": (3000, 96),
}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("tsv_m", {}),
    ("iso_c", {}),
    ("iso_cts", {}),
    ("knots", {}),
    ("wudi", {"steps": 20}),
    ("wudi", {"solve": "closed"}),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    write_model(tmp_path / "base", base)
    for number in range(3):
        write_model(tmp_path / f"ft{number}", fine_tuned(base, number, 0.01))
    return tmp_path


def planned(folder: Path, method: str, parameters: dict[str, Any] | None = None, **more: Any) -> Plan:
    recipe = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"ft{number}")} for number in range(3)],
        "parameters": parameters or {},
    }
    return mergebench.plan(mergebench.load(recipe), **more)


def result(plan: Plan, out: Path) -> dict[str, Tensor]:
    mergebench.run(plan, out, overwrite=True)
    return dict(load_file(out / "model.safetensors"))


def test_only_matrices_come_whole(folder: Path) -> None:
    plan = planned(folder, "tsv_m", workers=1)
    chunks = {name: [item.spans[0].numel for item in chunks_of(plan, name, 0)] for name in SHAPES}

    assert plan.whole == {name for name in SHAPES if name.endswith(("q.weight", "up.weight", "down.weight"))}
    for name in plan.whole:
        assert chunks[name] == [torch.Size(SHAPES[name]).numel()]
    assert len(chunks["model.embed_tokens.weight"]) == 5
    assert plan.longest == plan.chunk == TILE


@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_the_bits_do_not_depend_on_who_does_the_work(
    method: str, parameters: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = result(planned(folder, method, parameters, workers=1), folder / "out")
    for workers, fork in [(1, 1 << 60), (2, 1 << 60), (3, 1 << 60), (2, 0), (3, 0)]:
        monkeypatch.setattr(executors, "FORK_FROM", fork)
        again = result(planned(folder, method, parameters, workers=workers), folder / "out")
        assert all(torch.equal(again[name], value) for name, value in first.items())
    base = load_file(folder / "base" / "model.safetensors")
    tuned = [load_file(folder / f"ft{number}" / "model.safetensors") for number in range(3)]
    for name in ("model.embed_tokens.weight", "model.layers.0.norm.weight", "lm_head.weight"):
        torch.testing.assert_close(first[name], sum(tensors[name] for tensors in tuned) / 3, atol=1e-6, rtol=0)
    for name in SHAPES:
        assert 0 < (first[name] - base[name]).norm() < 10


@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_a_matrix_that_does_not_fit_is_refused(method: str, parameters: dict[str, Any], folder: Path) -> None:
    """The message's own number is enough, and a large embedding asks for nothing."""
    base = {"model.embed_tokens.weight": (20_000, 64), "model.layers.0.up.weight": (900, 800)}
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in base.items()}
    for name in ("base", "ft0", "ft1", "ft2"):
        write_model(folder / name, tensors)

    with pytest.raises(RecipeError, match=rf"--memory 20MB: '{method}' needs at least (\d+)MB here") as caught:
        planned(folder, method, parameters, workers=1, memory=20 * MB)
    needed = int(str(caught.value).split("at least ")[1].split("MB")[0])
    plan = planned(folder, method, parameters, workers=1, memory=needed * MB)
    assert needed - 1 < plan.peak_memory / MB <= needed
    assert plan.longest == 900 * 800
    assert [item.spans[0].numel for item in chunks_of(plan, "model.layers.0.up.weight", 0)] == [plan.longest]
    rows_read, results_and_sum = 4 * (4 + 8), 4 * 4
    assert needed * MB > plan.longest * (rows_read + results_and_sum)
    assert planned(folder, method, parameters, workers=2, memory=2 * needed * MB).peak_memory == 2 * plan.peak_memory
