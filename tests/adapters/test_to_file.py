"""An adapter of any type as one file of deltas: on the base it is what the adapter is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, OFTConfig, PeanutConfig, PeftConfig, UniLoraConfig, VeraConfig
from safetensors.torch import load_file, save_file

from mergebench.adapters import convert_to_file
from mergebench.checkpoint.header import read_header
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError, RecipeError
from tests.conftest import Cli
from tests.deltas import peft_types

TARGETS = ["q_proj", "down_proj"]
CASES: list[Any] = [
    pytest.param("llama", AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=TARGETS), id="AdaLoRA"),
    pytest.param("llama", OFTConfig(oft_block_size=8, target_modules=TARGETS), id="OFT"),
    pytest.param("gpt2", IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True), id="IA3"),
    pytest.param("llama", PeanutConfig(r=3, target_modules=TARGETS, depth=1), id="PEANuT, several layers"),
    pytest.param("llama", VeraConfig(r=3, target_modules=["q_proj"]), id="VeRA, shared parts"),
    pytest.param("gpt2", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, bias="all"), id="turned"),
    pytest.param("llama", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]), id="saved whole"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "config"), CASES)
def test_on_the_base_it_is_the_adapter(tmp_path: Path, family: str, config: PeftConfig) -> None:
    peft_types.make(tmp_path, family, config)
    base, adapter = str(tmp_path / "base"), tmp_path / "adapter"
    expected = open_model(f"{base}+{adapter}").state_dict()
    done = convert_to_file(base, adapter, tmp_path / "delta.safetensors").provenance
    for name, value in open_model(f"{base}+{tmp_path / 'delta.safetensors'}").state_dict().items():
        assert torch.equal(value, expected[name]), name
    convert_to_file(base, adapter, tmp_path / "dense.safetensors", dense=True)
    for name, value in open_model(f"{base}+{tmp_path / 'dense.safetensors'}").state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    assert done["tensors"] == len(open_model(f"{base}+{adapter}").deltas)


def test_shared_parts_are_written_once(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", UniLoraConfig(r=2, target_modules=TARGETS, save_indices=True))
    convert_to_file(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "delta.safetensors")
    stored = {info.name: info for info in read_header(tmp_path / "delta.safetensors").tensors}
    assert sum(name.startswith("shared.") for name in stored) == 1
    first = (tmp_path / "delta.safetensors").read_bytes()
    convert_to_file(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "delta.safetensors", overwrite=True)
    assert (tmp_path / "delta.safetensors").read_bytes() == first


def test_from_the_command_line(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    peft_types.make(tmp_path, "llama", OFTConfig(oft_block_size=8, target_modules=TARGETS))
    monkeypatch.chdir(tmp_path)
    convert = ("adapters", "convert", "adapter", "--base", "base", "--out")
    code, out, err = cli(*convert, "oft.safetensors", "--to", "delta")
    assert (code, out) == (0, "oft.safetensors\n") and "4 tensors as rotated: " in err
    again = cli(*convert, "oft.safetensors", "--to", "dense")
    assert again.code == 2 and "it exists" in again.err
    said = json.loads(cli(*convert, "oft.safetensors", "--to", "dense", "--overwrite", "--json").out)
    assert said["kinds"] == ["dense"] and said["bytes"] == Path("oft.safetensors").stat().st_size
    assert "rotated" not in cli("inspect", "base+oft.safetensors").out
    assert cli(*convert, "oft", "--to", "dense").code == 2
    assert cli(*convert, "a.safetensors", "--to", "dense", "--rank", "2").code == 2
    assert cli(*convert, "none/a.safetensors", "--to", "dense").code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "folded", "oft.safetensors"]


def test_two_changes_to_one_tensor_are_written_as_differences(tmp_path: Path) -> None:
    """A LoRA that brings its layer's weight along."""
    peft_types.make(tmp_path, "llama", LoraConfig(r=1, target_modules=["q_proj"], init_lora_weights=False))
    base, adapter = str(tmp_path / "base"), tmp_path / "adapter"
    file, name = adapter / "adapter_model.safetensors", "model.layers.0.self_attn.q_proj"
    weight = torch.randn_like(open_model(base).state_dict()[f"{name}.weight"])
    save_file(load_file(file) | {f"base_model.model.{name}.base_layer.weight": weight}, file, {"format": "pt"})
    expected = open_model(f"{base}+{adapter}").state_dict()
    with pytest.raises(ModelError, match="changes in 2 ways"):
        convert_to_file(base, adapter, tmp_path / "delta.safetensors")
    convert_to_file(base, adapter, tmp_path / "dense.safetensors", dense=True)
    for key, value in open_model(f"{base}+{tmp_path / 'dense.safetensors'}").state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)


def test_an_untied_head_is_refused(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "gpt2", LoraConfig(r=1, target_modules=["lm_head"], init_lora_weights=False))
    with pytest.raises(ModelError, match="it adds 'lm_head"):
        convert_to_file(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out.safetensors")


def test_an_input_is_not_written_over(tmp_path: Path) -> None:
    """Neither the adapter nor a file of the base, even with overwrite."""
    peft_types.make(tmp_path, "llama", OFTConfig(oft_block_size=8, target_modules=TARGETS))
    base, file = str(tmp_path / "base"), tmp_path / "oft.safetensors"
    convert_to_file(base, tmp_path / "adapter", file)
    before = file.read_bytes()
    for out, what in ((file, "it is an input"), (tmp_path / "base" / "model.safetensors", "it lies in an input")):
        with pytest.raises(RecipeError, match=what):
            convert_to_file(base, file, out, dense=True, overwrite=True)
    assert file.read_bytes() == before
