"""The same recipe gives the numbers that mergekit 0.1.5 gives, in float32, as recorded in tests/golden."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mergebench

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import mergekit_cases

GOLDEN = load_file(Path(mergekit_cases.__file__).with_name("mergekit.safetensors"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    mergekit_cases.write_models(folder)
    return folder


@pytest.mark.parametrize("case", mergekit_cases.CASES)
def test_a_mergekit_recipe_gives_mergekits_numbers(
    case: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(mergekit_cases.CASES[case], encoding="utf-8")
    monkeypatch.chdir(models)

    mergebench.run(mergebench.plan(mergebench.load(recipe)), tmp_path / "out")

    merged = load_file(tmp_path / "out" / "model.safetensors")
    start = f"{case}/"
    expected = {name.removeprefix(start): value for name, value in GOLDEN.items() if name.startswith(start)}
    assert expected.keys() == merged.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=2e-6, atol=2e-7, msg=name)
