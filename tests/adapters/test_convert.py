"""An adapter of any type as a LoRA: what PEFT makes of the LoRA is what it makes of the adapter."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import read_model
from peft import DeftConfig, HiraConfig, HRAConfig, IA3Config, LoraConfig, PeanutConfig, PeftConfig, PeftModel

from mergebench.adapters import convert_adapter
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.conftest import Cli
from tests.deltas import peft_types

TARGETS = ["q_proj", "down_proj"]
LORA = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False, modules_to_save=["lm_head"])
HIRA = HiraConfig(r=2, target_modules=TARGETS, init_weights=False)
CONV = IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True)
QR: dict[str, Any] = {"decomposition_method": "qr", "fan_in_fan_out": True}

CASES: list[Any] = [
    pytest.param("llama", LORA, {}, 3, id="LoRA, exact"),
    pytest.param("llama", HIRA, {"rank": 16}, 16, id="HiRA, all ranks"),
    pytest.param("llama", HIRA, {"energy": 1.0}, 16, id="HiRA, all energy"),
    pytest.param("gpt2", CONV, {"rank": 99}, 16, id="IA3 with biases, stored [in, out]"),
    pytest.param("llama", HRAConfig(r=4, target_modules=TARGETS), {}, 4, id="HRA, exact given the base"),
    pytest.param("llama", HRAConfig(r=4, apply_GS=True, target_modules=TARGETS), {}, 4, id="HRA, orthogonal"),
    pytest.param("llama", DeftConfig(r=3, target_modules=TARGETS), {}, 3, id="DEFT, exact given the base"),
    pytest.param("gpt2", DeftConfig(r=3, target_modules=["c_attn"], **QR), {}, 3, id="DEFT, stored [in, out]"),
    pytest.param("llama", PeanutConfig(r=3, target_modules=TARGETS, depth=1), {}, 3, id="PEANuT, exact given the base"),
]


def as_peft_merges(folder: Path, adapter: Path) -> dict[str, torch.Tensor]:
    auto = transformers.AutoModelForCausalLM
    with warnings.catch_warnings(action="ignore"):
        model = PeftModel.from_pretrained(auto.from_pretrained(folder / "base"), adapter)
        model.merge_and_unload().save_pretrained(folder / "merged")
    return read_model(folder / "merged")


@pytest.mark.parametrize(("family", "config", "how", "rank"), CASES)
def test_peft_makes_the_same_of_it(
    tmp_path: Path, family: str, config: PeftConfig, how: dict[str, Any], rank: int
) -> None:
    expected = peft_types.make(tmp_path, family, config)
    done = convert_adapter(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out", **how)
    assert {module["rank"] for module in done.provenance["modules"].values()} == {rank}
    assert done.provenance["energy_kept"] == pytest.approx(1)
    ours = open_model(f"{tmp_path / 'base'}+{tmp_path / 'out'}").state_dict()
    for found in (as_peft_merges(tmp_path, tmp_path / "out"), ours):
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def test_a_smaller_rank_is_the_best_one(tmp_path: Path) -> None:
    """By singular values, and the energy kept is what they say."""
    expected = peft_types.make(tmp_path, "llama", HIRA)
    done = convert_adapter(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out", rank=2).provenance
    base = read_model(tmp_path / "base")
    for module, about in done["modules"].items():
        values = torch.linalg.svdvals((expected[f"{module}.weight"] - base[f"{module}.weight"]).double()).square()
        assert about["energy_kept"] == pytest.approx(float(values[:2].sum() / values.sum()), rel=1e-4)


def test_from_the_command_line(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    peft_types.make(tmp_path, "llama", HIRA)
    monkeypatch.chdir(tmp_path)
    refused = cli("adapters", "convert", "adapter", "--base", "base", "--out", "out")
    assert refused.code == 3 and "multiplicative rank 2 has no exact low-rank form" in refused.err
    assert "a share of the energy to keep" in refused.err and not Path("out").exists()
    done = cli("adapters", "convert", "adapter", "--base", "base", "--out", "out", "--energy", ".9")
    assert done.code == 0 and "of the energy kept" in done.err and done.out == "out\n"
    assert json.loads(Path("out/adapter_config.json").read_text())["peft_type"] == "LORA"
    said = json.loads(
        cli("adapters", "convert", "adapter", "--base", "base", "--out", "two", "--rank", "1", "--json").out
    )
    assert {module["rank"] for module in said["modules"].values()} == {1}
    assert cli("adapters", "convert", "adapter", "--base", "base", "--out", "out", "--to", "ia3").code == 2
    assert cli("adapters", "convert", "adapter", "--base", "base", "--out", "out", "--rank", "0").code == 2


def test_what_no_lora_holds(tmp_path: Path) -> None:
    config = IA3Config(
        target_modules=["c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True, modules_to_save=["ln_f"]
    )
    peft_types.make(tmp_path, "gpt2", config)
    convert_adapter(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out", rank=1)  # norms are saved whole
    peft_types.make(tmp_path / "two", "llama", LoraConfig(r=1, target_modules=["q_proj"], trainable_token_indices=[1]))
    with pytest.raises(ModelError, match=r"trained tokens|cannot hold"):
        convert_adapter(str(tmp_path / "two/base"), tmp_path / "two/adapter", tmp_path / "out2")
