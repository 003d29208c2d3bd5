"""What is told of an adapter, against PEFT's own differences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergebench.adapters import describe_adapter
from tests.adapters.test_merge import BERT, SETTINGS, effect, place, save, write
from tests.conftest import Cli

assert place  # the fixture


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_norms_are_those_of_the_differences(place: Path, name: str) -> None:
    found = describe_adapter(place / name)
    squares: dict[str, float] = {}
    for module, delta in effect(place, place / name).items():
        layer = ".".join(module.split(".")[:3])
        squares[layer] = squares.get(layer, 0.0) + float(delta.double().square().sum())
    assert found.norm_of == "differences" and found.norms == pytest.approx({k: v**0.5 for k, v in squares.items()})
    assert found.norm == pytest.approx(sum(squares.values()) ** 0.5)
    stored = load_file(place / name / "adapter_model.safetensors")
    assert found.parameters == sum(value.numel() for value in stored.values())
    assert found.bytes == sum((place / name / file).stat().st_size for file in SIZED)
    assert found.targets == sorted(SETTINGS[name]["target_modules"])


SIZED = ("adapter_config.json", "adapter_model.safetensors")


def test_ranks_and_scales(place: Path) -> None:
    assert (describe_adapter(place / "a").ranks, describe_adapter(place / "a").scales) == ([4], [1.5])
    assert (describe_adapter(place / "b").variants, describe_adapter(place / "b").scales) == (["rsLoRA"], [1.5])
    patterns = describe_adapter(place / "c")
    assert patterns.ranks == [2, 3] and patterns.scales == pytest.approx([4 / 3, 7 / 2])


def test_what_is_no_difference_is_told_as_tensors(tmp_path: Path) -> None:
    dora = describe_adapter(save(tmp_path, "dora", {"r": 2, "target_modules": ["query"], "use_dora": True}, BERT))
    assert dora.norm_of == "tensors" and dora.variants == ["DoRA"] and dora.ranks == [2]
    whole = save(tmp_path, "whole", {"r": 2, "target_modules": ["query"], "modules_to_save": ["pooler"]}, BERT)
    found = describe_adapter(whole)
    assert found.saved_whole == ["pooler"] and list(found.norms) == ["encoder.layer.0"]
    # of a kind that is not read as factors: told all the same
    pissa = write(tmp_path / "pissa", {"layers.0.q": (torch.ones(4, 1), torch.ones(1, 4))}, init_lora_weights="pissa")
    assert describe_adapter(pissa).norms == pytest.approx({"layers.0": 8**0.5})


def test_a_banks_adapter(cli: Cli, tmp_path: Path) -> None:
    tensors = {"layers.0.down.weight": torch.ones(3, 8), "layers.0.up.weight": torch.zeros(8, 3), "last": torch.ones(4)}
    save_file(tensors, tmp_path / "01.safetensors", metadata={"kind": "bottleneck", "scale": "0.1"})
    found = describe_adapter(tmp_path / "01.safetensors")
    assert (found.name, found.kind, found.ranks, found.scales) == ("01", "bottleneck", [3], [0.1])
    assert found.norms == pytest.approx({"layers.0": 24**0.5, "other": 2.0}) and found.norm == pytest.approx(28**0.5)
    save_file({"x": torch.tensor([torch.inf])}, tmp_path / "bad.safetensors")
    code, out, err = cli("adapters", "inspect", tmp_path / "01.safetensors", tmp_path / "bad.safetensors")
    assert (code, out) == (1, "") and "'x' holds NaN or infinity" in err


def test_the_command(cli: Cli, place: Path) -> None:
    code, out, err = cli("adapters", "inspect", place / "a", place / "c")
    table, _, ranks = out.partition("\n\nc: rank of each module\n")
    lines = [line.split() for line in table.splitlines()]
    assert (code, err) == (0, "") and "rank" in ranks
    assert lines[0] == ["a", "c"] and ["rank", "4", "2", "to", "3"] in lines and ["type", "LORA", "LORA"] in lines
    (first,) = (line for line in lines if line[0] == "model.layers.0")
    assert first[1:] == [f"{describe_adapter(place / 'a').norms['model.layers.0']:.4f}"]  # c has nothing there
    code, out, _ = cli("adapters", "inspect", place / "b", "--json")
    assert code == 0 and json.loads(out) == [describe_adapter(place / "b").to_plain()]
    # and as a model is looked at
    assert cli("inspect", place / "b").out == cli("adapters", "inspect", place / "b").out


def test_nan(cli: Cli, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad", {"layers.0.q": (torch.ones(4, 1), torch.full((1, 4), torch.nan))})
    code, _, err = cli("adapters", "inspect", bad)
    assert code == 1 and "'base_model.model.layers.0.q.lora_A.weight' or its B holds NaN or infinity" in err
