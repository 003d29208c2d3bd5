"""The same recipe gives the numbers that mergekit 0.1.5 gives, in float32, as recorded in tests/golden."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mergebench

GOLDEN = Path(__file__).parents[1] / "golden" / "mergekit.safetensors"
CASES = ["linear", "task_arithmetic", "ties", "tiesneg", "slerp", "slerp2"]


@pytest.mark.parametrize("case", CASES)
def test_a_mergekit_recipe_gives_mergekits_numbers(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load_file(GOLDEN)
    with safe_open(GOLDEN, "pt") as file:
        recipe = file.metadata()[case]
    for model in ("base", "ft1", "ft2", "ft3"):
        (tmp_path / model).mkdir()
        start = f"inputs/{model}/"
        tensors = {name.removeprefix(start): value for name, value in golden.items() if name.startswith(start)}
        save_file(tensors, tmp_path / model / "model.safetensors")
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    mergebench.run(mergebench.plan(mergebench.load("recipe.yaml")), "out")

    merged = load_file("out/model.safetensors")
    expected = {name.removeprefix(f"{case}/"): value for name, value in golden.items() if name.startswith(f"{case}/")}
    assert expected.keys() == merged.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-6, atol=1e-8)
