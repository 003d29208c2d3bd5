"""`target_modules` as PEFT users write them: short, and PEFT finds the same modules by them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mergebench.adapters.peft_names import targets_of
from mergebench.deltas.open import open_model
from tests.conftest import Cli
from tests.deltas.lora_models import save_base

LANGUAGE, ENCODER = transformers.AutoModelForCausalLM, transformers.AutoModel
EVERY = ["--include", "*"]
CASES = {
    "llama": (LANGUAGE, EVERY, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    "llama, one layer": (LANGUAGE, ["--include", "*.1.self_attn.q_proj*"], ["model.layers.1.self_attn.q_proj"]),
    "gpt2": (LANGUAGE, EVERY, ["c_attn", "c_fc", "c_proj"]),
    "gpt2, MLP": (LANGUAGE, ["--include", "*.mlp.*"], ["c_fc", "mlp.c_proj"]),
    "bert": (ENCODER, ["--include", "encoder.*"], None),
    "bert, attention's output": (ENCODER, ["--include", "*.attention.output.*"], ["attention.output.dense"]),
    "bert, MLP's output": (ENCODER, ["--include", "encoder.layer.?.output.*"], None),
    "mixtral": (LANGUAGE, ["--include", "*.self_attn.*"], None),
}


def fine_tune(folder: Path) -> None:
    """folder/tuned: every matrix of the base moved."""
    (folder / "tuned").mkdir()
    draw = torch.Generator().manual_seed(5)
    tensors = load_file(folder / "base" / "model.safetensors")
    moved = {name: value + 0.1 * torch.randn(value.shape, generator=draw) for name, value in tensors.items()}
    save_file(moved, folder / "tuned" / "model.safetensors", metadata={"format": "pt"})
    (folder / "tuned" / "config.json").write_text((folder / "base" / "config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_peft_finds_the_same_modules(case: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    auto, which, expected = CASES[case]
    save_base(tmp_path, case.partition(",")[0], auto)
    fine_tune(tmp_path)
    command = ("adapters", "extract", "--base", "base", "--model", "tuned", "--rank", 2)
    ran = cli(*command, *which, "--out", "lora")
    assert ran.code == 0, ran.err
    targets = json.loads(Path("lora/adapter_config.json").read_text())["target_modules"]
    stored = {name.partition(".lora_")[0] for name in load_file("lora/adapter_model.safetensors")}
    with warnings.catch_warnings(action="ignore"):
        loaded = PeftModel.from_pretrained(auto.from_pretrained("base"), "lora")
    wrapped = {name.partition(".lora_")[0] for name, _ in loaded.named_parameters() if ".lora_" in name}
    assert wrapped == stored
    if expected is not None:
        assert targets == expected
    folded = loaded.merge_and_unload().state_dict()
    ours = auto.from_pretrained(_folded(cli))
    assert all(torch.allclose(folded[name], value, atol=1e-5) for name, value in ours.state_dict().items())


def _folded(cli: Cli) -> str:
    assert cli("adapters", "fold", "lora", "--base", "base", "--out", "folded").code == 0
    return "folded"


def test_ends_that_other_modules_share(tmp_path: Path) -> None:
    """By brute force, as PEFT reads the setting: whatever is asked for, that is found and no more."""
    save_base(tmp_path, "bert", ENCODER)
    model = open_model(str(tmp_path / "base"))
    every = [name for name, _ in ENCODER.from_pretrained(tmp_path / "base").named_modules()]
    linear = [name.removesuffix(".weight") for name in model.tensors if name.endswith("weight") and ".layer." in name]
    draw = torch.Generator().manual_seed(0)
    for _ in range(30):
        share = torch.rand(1, generator=draw)
        wanted = {name for name in linear if torch.rand(1, generator=draw) < share}
        targets = targets_of(model, wanted)
        found: Any = {m for m in every if any(m == t or m.endswith(f".{t}") for t in targets)}
        assert found == wanted and len(targets) <= len(wanted)
