"""Adapters of other tools given as models or as deltas are refused, never averaged; models with such parts are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import write_model, write_recipe

from mergebench.deltas.open import open_model
from mergebench.deltas.peft.foreign import foreign_format
from mergebench.errors import ModelError
from tests.conftest import Cli

UNET = "lora_unet_down_blocks_0_attentions_0_proj_in"
FILES = {
    "kohya": ([f"{UNET}.lora_down.weight", f"{UNET}.lora_up.weight", f"{UNET}.alpha"], "kohya"),
    "loha": ([f"{UNET}.hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b")] + [f"{UNET}.alpha"], "LyCORIS"),
    "lokr": ([f"{UNET}.lokr_w1", f"{UNET}.lokr_w2_a", f"{UNET}.lokr_w2_b", f"{UNET}.alpha"], "LyCORIS"),
    "diffusers": (["unet.to_q_lora.down.weight", "unet.to_q_lora.up.weight"], "older diffusers"),
    "diffusers, later": (["mid.to_q.lora.down.weight", "mid.to_q.lora.up.weight"], "older diffusers"),
    "PEFT": (["model.q_proj.lora_A.weight", "model.q_proj.lora_B.weight"], "PEFT"),
    "PEFT, another type": (["base_model.model.model.q_proj.ia3_l"], "PEFT"),
}


@pytest.mark.parametrize("case", FILES)
def test_an_adapter_is_no_model(tmp_path: Path, case: str) -> None:
    names, what = FILES[case]
    write_model(tmp_path / "one", {name: torch.ones(2, 2) for name in names})
    with pytest.raises(ModelError, match=f"it is an adapter, not a model: .*{what}"):
        open_model(str(tmp_path / "one" / "model.safetensors"))


def test_each_command_says_so(tmp_path: Path, cli: Cli) -> None:
    tensors = {name: torch.ones(() if name.endswith("alpha") else (2, 2)) for name in FILES["kohya"][0]}
    file = write_model(tmp_path / "k", tensors) / "model.safetensors"
    base = write_model(tmp_path / "base", {"w": torch.ones(2, 2)})
    recipe = write_recipe(tmp_path / "r.yaml", "linear", [file, file], None)
    said = "it is an adapter, not a model: LoRA factors as kohya's scripts save them"
    lost = f"1 of 1 layers fit nothing: {UNET}: the base has no such layer"
    for command, says in (
        (["merge", recipe, "--out", tmp_path / "out"], f"{said}\nhint: name its base: BASE+{file}"),
        (["adapters", "fold", file, "--base", base, "--out", tmp_path / "out"], lost),
        (["plan", write_recipe(tmp_path / "s.yaml", "linear", [f"{base}+{file}"], None)], lost),
    ):
        code, _, err = cli(*command)
        assert code == 3 and says in err


def test_a_model_with_factors_in_it() -> None:
    assert foreign_format(["q.base_layer.weight", "q.lora_A.speech.weight", "norm.weight"]) is None
    assert foreign_format(["model.alpha", "model.bias", "model.scale"]) is None
