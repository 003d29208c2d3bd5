"""A small base, two fine-tunes of it, and a change to it of every kind, each as it lies on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import mergebench
from tests.models import CONFIG, fine_tuned, read_model, write_model

WIDTH, INNER, LAYERS = 16, 24, 4
SQUARE = [f"model.layers.{n}.square" for n in range(LAYERS)]
UP = [f"model.layers.{n}.up" for n in range(LAYERS)]
# What comes after `base+`. A tensor is added to, scaled, replaced, or changed in some rows.
CHANGES = {
    "LoRA": "lora",
    "DoRA": "dora",
    "LoRA, Conv1D": "conv",
    "bias of B": "bias_of_b",
    "biases saved whole": "biases",
    "a module saved whole": "whole",
    "patch": "edited/patch.safetensors",
    "task of EMR": "emr/tasks/ft1",
}


def base_tensors() -> dict[str, Tensor]:
    """Four layers with a square matrix, its bias and a wide one; what lies before and after; an integer tensor."""
    random = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (11, WIDTH)}
    for square, up in zip(SQUARE, UP, strict=True):
        shapes |= {f"{square}.weight": (WIDTH, WIDTH), f"{square}.bias": (WIDTH,), f"{up}.weight": (INNER, WIDTH)}
    shapes["model.norm.weight"] = (WIDTH,)
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()} | {"steps": torch.arange(5)}


def write_adapter(
    directory: Path,
    base: Mapping[str, Tensor],
    modules: Iterable[str],
    *,
    seed: int = 0,
    rank: int = 3,
    whole: Sequence[str] = (),
    **config: Any,
) -> Path:
    """A LoRA directory as PEFT saves it; whole: tensors of the base that it has its own values of."""
    random = torch.Generator().manual_seed(100 + seed)
    factors = {}
    for module in modules:
        height, width = base[f"{module}.weight"].shape[:: -1 if config.get("fan_in_fan_out") else 1]
        factors[f"{module}.lora_A.weight"] = 0.3 * torch.randn(rank, width, generator=random)
        factors[f"{module}.lora_B.weight"] = 0.3 * torch.randn(height, rank, generator=random)
        if config.get("use_dora"):
            factors[f"{module}.lora_magnitude_vector"] = 4 + torch.rand(height, generator=random)
        if config.get("lora_bias"):
            factors[f"{module}.lora_B.bias"] = torch.randn(height, generator=random)
    factors |= {name: base[name].float() + torch.randn(base[name].shape, generator=random) for name in whole}
    directory.mkdir(parents=True)
    save_file(
        {f"base_model.model.{name}": value for name, value in factors.items()}, directory / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **config}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def write_patch(file: Path, base: Mapping[str, Tensor], modules: Iterable[str], every: int = 3) -> Path:
    """An edit of every third row of some matrices, and of every third column of the last."""
    random, modules = torch.Generator().manual_seed(9), list(modules)
    file.parent.mkdir()
    tensors = {"direction": torch.randn(WIDTH, generator=random)}
    for module in modules:
        matrix = base[f"{module}.weight"].T if module == modules[-1] else base[f"{module}.weight"]
        rows = torch.arange(0, len(matrix), every)
        tensors[f"{module}.weight.rows"] = rows
        tensors[f"{module}.weight.amount"] = torch.randn(len(rows), generator=random)
        tensors[f"{module}.weight.orig"] = matrix[rows].contiguous()
    save_file(tensors, file, metadata={"patch": json.dumps({"columns": [f"{modules[-1]}.weight"]})})
    return file


def write_world(folder: Path) -> Path:
    """`base`, `ft1`, `ft2`, and all of `CHANGES`; `other`, a second LoRA on some of the same tensors."""
    base = base_tensors()
    config = CONFIG | {"num_hidden_layers": LAYERS}
    write_model(folder / "base", base, shards=2, config=config)
    for seed, name in enumerate(("ft1", "ft2")):
        write_model(folder / name, fine_tuned(base, seed), config=config)
    write_adapter(folder / "lora", base, [*SQUARE, *UP])
    write_adapter(folder / "other", base, [*SQUARE[:2], *UP], seed=1, rank=2)
    write_adapter(folder / "dora", base, SQUARE, seed=2, use_dora=True)
    write_adapter(folder / "conv", base, SQUARE, seed=3, fan_in_fan_out=True)
    write_adapter(folder / "bias_of_b", base, SQUARE, seed=4, lora_bias=True)
    biases = [f"{module}.bias" for module in SQUARE]
    write_adapter(folder / "biases", base, SQUARE, seed=5, whole=biases, bias="lora_only")
    write_adapter(folder / "whole", base, SQUARE, seed=6, whole=["model.norm.weight"], modules_to_save=["norm"])
    write_patch(folder / "edited/patch.safetensors", base, [*UP[:2], *SQUARE])
    recipe = {
        "merge_method": "emr",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in ("ft1", "ft2")],
    }
    mergebench.run(mergebench.plan(mergebench.load(recipe)), folder / "emr")
    return folder


def merge(out: str, method: str, models: Sequence[Any], base: str | None = None, **more: Any) -> dict[str, Tensor]:
    """The tensors that a recipe gives; a model is a reference, or an entry as a mapping."""
    entries = [one if isinstance(one, dict) else {"model": one} for one in models]
    return carry_out({"merge_method": method, "models": entries} | ({"base_model": base} if base else {}) | more, out)


def merge_slices(out: str, method: str, *slices: list[tuple[str, int, int]], **more: Any) -> dict[str, Tensor]:
    """The tensors that slices give; a source is (model, first layer, end)."""
    parts = [{"sources": [{"model": m, "layer_range": [a, b]} for m, a, b in one]} for one in slices]
    return carry_out({"merge_method": method, "slices": parts, **more}, out)


def carry_out(recipe: dict[str, Any], out: str) -> dict[str, Tensor]:
    return read_model(mergebench.run(mergebench.plan(mergebench.load(recipe), device="cpu"), out).out)


def fold(reference: str, out: str = "folded") -> str:
    """The model that a reference stands for, as a checkpoint in float32: the oracle of these tests."""
    merge(out, "passthrough", [reference], dtype="float32")
    return out


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], close: float = 0.0) -> None:
    """To the bit, or within `close`."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        try:
            torch.testing.assert_close(found[name], value, rtol=close, atol=close)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
