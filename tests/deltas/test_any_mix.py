"""Changes of any kind in one merge: what the same merge of the folded models gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_model, write_model
from peft import IA3Config, LoraConfig, OFTConfig, PeftConfig
from safetensors.torch import load_file, save_file

import mergebench
from mergebench.deltas.formats.native import Writing, write_file
from mergebench.deltas.open import open_model
from tests.deltas import peft_types

LAYERS = ["q_proj", "down_proj"]
ADAPTERS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=2, lora_alpha=2, target_modules=LAYERS),
    "oft": OFTConfig(r=0, oft_block_size=2, target_modules=LAYERS, use_cayley_neumann=False),
    "ia3": IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]),
}
METHODS = {"ties": {"density": 0.3}, "pcb": {"density": 0.2}, "linear": {}}


def even(shape: tuple[int, ...], step: float, most: int, random: torch.Generator) -> torch.Tensor:
    """Random multiples of a power of two: their sums and products are exact in float32."""
    return torch.randint(-most, most + 1, shape, generator=random).float() * step


def made(folder: Path, exact: bool) -> list[str]:
    """A base, and references of an adapter of each type, a patch and a fine-tune on it."""
    random = torch.Generator().manual_seed(0)
    for name, config in ADAPTERS.items():
        peft_types.make(folder / name, "llama", config)
        file = folder / name / "adapter" / "adapter_model.safetensors"
        stored = load_file(file)
        if exact:  # a rotation by Cayley's transform of 1 or -1 is one of 90 degrees
            steps = {"oft_R": (1.0, 1), "ia3_l": (0.25, 8)}
            values = {
                key: even(tuple(value.shape), *next((s for n, s in steps.items() if n in key), (0.25, 2)), random)
                for key, value in stored.items()
            }
            save_file(values, file, {"format": "pt"})
    base = read_model(folder / "lora" / "base")
    if exact:
        base = {name: even(tuple(value.shape), 1 / 64, 64, random) for name, value in base.items()}
    write_model(folder / "base", base)
    name = "model.layers.0.mlp.gate_proj.weight"
    direction = even((base[name].shape[1],), 0.25, 4, random)
    parts = {"direction": direction, "rows": torch.tensor([1, 4]), "amount": torch.tensor([0.5, -0.25])}
    write_file(folder / "patch.safetensors", {name: Writing("row_patch", {}, parts)})
    write_model(folder / "tuned", {n: v + even(tuple(v.shape), 1 / 64, 8, random) for n, v in base.items()})
    adapters = [f"{folder / 'base'}+{folder / name / 'adapter'}" for name in ADAPTERS]
    return [*adapters, f"{folder / 'base'}+{folder / 'patch.safetensors'}", str(folder / "tuned")]


def merged(folder: Path, models: list[str], method: str, out: str) -> dict[str, torch.Tensor]:
    recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": model} for model in models]}
    if method != "linear":
        recipe |= {"base_model": str(folder / "base")}
    recipe["parameters"] = METHODS[method]
    return read_model(mergebench.run(mergebench.plan(mergebench.load(recipe), device="cpu"), folder / out).out)


def folded(folder: Path, models: list[str]) -> list[str]:
    for number, model in enumerate(models):
        write_model(folder / f"folded-{number}", open_model(model).state_dict())
    return [str(folder / f"folded-{number}") for number in range(len(models))]


@pytest.mark.parametrize("method", METHODS)
def test_where_arithmetic_is_exact_the_bits_are_those_of_the_folded_models(tmp_path: Path, method: str) -> None:
    models = made(tmp_path, exact=True)
    base, states = read_model(tmp_path / "base"), [open_model(model).state_dict() for model in models]
    for state in states:
        assert any(not torch.equal(state[name], value) for name, value in base.items())
    mine = merged(tmp_path, models, method, "mine")
    expected = merged(tmp_path, folded(tmp_path, models), method, "expected")
    for name, value in mine.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_elsewhere_they_differ_by_the_rounding_of_the_folded_models(tmp_path: Path, method: str) -> None:
    """A difference is taken as it is, not as W' rounded less W; few elements are so near a threshold."""
    models = made(tmp_path, exact=False)
    mine = merged(tmp_path, models, method, "mine")
    expected = merged(tmp_path, folded(tmp_path, models), method, "expected")
    apart = torch.cat([((value - expected[name]).abs() > 1e-6).flatten() for name, value in mine.items()])
    assert float(apart.float().mean()) < 1e-3
