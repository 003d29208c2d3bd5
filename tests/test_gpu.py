"""The same merge on a CUDA device: equal to the CPU to 1e-6 of the largest weight.

python -m pytest -m gpu tests/test_gpu.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergebench

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

METHODS = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.2},
    "dare_ties": {"density": 0.5},
    "pcb": {"density": 0.1},
    "breadcrumbs": {"density": 0.3, "gamma": 0.05},
    "della": {"density": 0.4},
    "sce": {"select_topk": 0.3},
    "ramplus_tl": {"epsilon": 0.005},
    "consensus_ta": {},
    "emr": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_gives_what_the_cpu_gives(method: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (300, 1000), "b": (70_001,), "c": (5,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(base, tmp_path / "base.safetensors")
    for number in range(3):
        tuned = {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        save_file(tuned, tmp_path / f"ft{number}.safetensors")
    recipe = mergebench.load(
        {
            "merge_method": method,
            "base_model": str(tmp_path / "base.safetensors"),
            "models": [{"model": str(tmp_path / f"ft{number}.safetensors")} for number in range(3)],
            "parameters": METHODS[method],
        }
    )
    merged = {}
    for device in ("cpu", "cuda"):
        mergebench.run(mergebench.plan(recipe, device=device), tmp_path / device)
        merged[device] = load_file(tmp_path / device / "model.safetensors")

    for name in shapes:
        expected, actual = merged["cpu"][name], merged["cuda"][name]
        different = (expected - actual).abs() > 1e-6 * expected.abs().max()
        assert different.sum() <= 1, f"{name}: {int(different.sum())} elements differ"
