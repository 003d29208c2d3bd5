"""BASE+A+B of adapters of two types on a base in shards, against PEFT merging one after the other."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import mergebench
from tests.models import write_recipe

pytestmark = pytest.mark.filterwarnings("ignore")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LAYERS = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "hra": ("HRAConfig", {"r": 4}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "hira": ("HiraConfig", {"r": 4}),
    "lokr": ("LoKrConfig", {"r": 4}),
    "shira": ("ShiraConfig", {"r": 4}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base", max_shard_size="20KB")
    assert len(list((folder / "base").glob("*.safetensors"))) > 4
    for name, (kind, settings) in KINDS.items():
        with warnings.catch_warnings(action="ignore"):
            model = peft.get_peft_model(load(folder / "base"), getattr(peft, kind)(target_modules=LAYERS, **settings))
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value.add_(0.05 * torch.randn_like(value))
        model.save_pretrained(folder / name)
    return folder


def load(place: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("first, second", itertools.permutations(KINDS, 2))
def test_as_peft_merges_them(folder: Path, first: str, second: str) -> None:
    model = load(folder / "base")
    for name in (first, second):
        model = peft.PeftModel.from_pretrained(model, folder / name).merge_and_unload()
    expected = model.state_dict()
    write_recipe(folder / "recipe.yaml", "passthrough", [f"{folder}/base+{folder}/{first}+{folder}/{second}"])
    mergebench.run(mergebench.plan(mergebench.load(folder / "recipe.yaml")), folder / "out", overwrite=True)
    found = load(folder / "out").state_dict()
    assert all((found[name] - expected[name]).norm() <= 2e-6 * expected[name].norm() for name in expected)
