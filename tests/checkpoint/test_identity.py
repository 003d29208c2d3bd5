"""A model's identity: equal however the files are cut, different for what computes something else."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from mergebench.checkpoint.content import identity
from mergebench.deltas.open import open_model
from tests.models import fine_tuned, tiny_tensors, write_model


def of(place: object) -> str:
    return identity(open_model(str(place)))


def test_equal_for_equal_models(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    one = of(write_model(tmp_path / "one", tensors))
    assert len(one) == 16
    assert int(one, 16) >= 0
    assert of(write_model(tmp_path / "two", dict(reversed(tensors.items())), shards=3, metadata={"a": "b"})) == one


def test_tells_models_apart(tmp_path: Path) -> None:
    tensors = {**tiny_tensors(), "big": torch.zeros(300, 50)}
    other = {"big": tensors["big"].clone()}
    other["big"][299] = 1  # the last row alone
    changes = [
        {},
        fine_tuned(tensors, 1),
        {"norm.weight": tensors["norm.weight"].to(torch.bfloat16)},
        {"norm.weight": tensors["norm.weight"].reshape(3, 1)},
        {"steps": tensors["steps"] + 1},
        {"empty": torch.zeros(0, 3)},
        other,
    ]
    found = [of(write_model(tmp_path / str(n), {**tensors, **change})) for n, change in enumerate(changes)]
    assert len(set(found)) == len(changes)


def test_scattered_rows_of_many_matrices_show(tmp_path: Path) -> None:
    """What an edit of a twentieth of the rows does to 16 matrices, wherever the rows are."""
    tensors = {f"layers.{n}.gate.weight": torch.zeros(400, 64) for n in range(16)}
    before = of(write_model(tmp_path / "a", tensors))
    for seed in range(10):
        chosen = torch.randperm(16 * 400, generator=torch.Generator().manual_seed(seed))[: 16 * 20]
        edited = {name: tensor.clone() for name, tensor in tensors.items()}
        for row in chosen.tolist():
            edited[f"layers.{row // 400}.gate.weight"][row % 400] = 1
        assert of(write_model(tmp_path / "b", edited)) != before


def test_an_adapter_counts(tmp_path: Path) -> None:
    write_model(tmp_path / "base", tiny_tensors())
    found = {of(tmp_path / "base")}
    for number, (seed, alpha) in enumerate([(0, 2), (1, 2), (1, 3)]):
        place = tmp_path / str(number)
        place.mkdir()
        random = torch.Generator().manual_seed(seed)
        factors = {
            "base_model.model.layers.0.lora_A.weight": torch.randn(2, 8, generator=random),
            "base_model.model.layers.0.lora_B.weight": torch.randn(8, 2, generator=random),
        }
        save_file(factors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": 2, "lora_alpha": {alpha}}}')
        found.add(of(f"{tmp_path / 'base'}+{place}"))
    assert len(found) == 4
