"""HiRA: PEFT's `merge_and_unload` is the oracle, and the program knows the kind without having been told."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import read_model
from peft import HiraConfig, PeftModel, get_peft_model
from torch import Tensor

import mergebench
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.conftest import Cli
from tests.deltas.test_lora import GPT2, LLAMA

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (LLAMA, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "Conv1D": (GPT2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "ranks": (LLAMA, {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 5}}),
    "saved whole": (LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
}


def make(folder: Path, kind: str) -> dict[str, Tensor]:
    """A base and an adapter on it, both saved; what PEFT makes of the two."""
    config, settings = KINDS[kind]
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder / "base")
    with warnings.catch_warnings(action="ignore"):
        model = get_peft_model(auto.from_pretrained(folder / "base"), HiraConfig(r=3, init_weights=False, **settings))
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "hira_" in name or value.requires_grad:
                    value.add_(0.2 * torch.randn_like(value))
        model.save_pretrained(folder / "hira", save_embedding_layers=False)
        again = PeftModel.from_pretrained(auto.from_pretrained(folder / "base"), folder / "hira")
        again.merge_and_unload().save_pretrained(folder / "folded")
    return read_model(folder / "folded")


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_merges_it_like_peft(tmp_path: Path, kind: str) -> None:
    expected = make(tmp_path, kind)
    reference = f"{tmp_path / 'base'}+{tmp_path / 'hira'}"
    recipe = {"merge_method": "passthrough", "models": [{"model": reference}]}
    out = read_model(mergebench.run(mergebench.plan(mergebench.load(recipe)), tmp_path / "out").out)
    base = read_model(tmp_path / "base")
    changed = [name for name in base if not torch.equal(base[name], out[name])]
    assert changed == [name for name in base if not torch.equal(base[name], expected[name])] and changed
    for name, value in out.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_as_a_task_vector_and_as_a_base(tmp_path: Path) -> None:
    """In a merge it counts with what it adds to this base; as a base it is the folded model."""
    make(tmp_path, "linear")
    base, hira = tmp_path / "base", tmp_path / "hira"
    other = open_model(f"{base}+{hira}").state_dict()
    twice = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [{"model": f"{base}+{hira}"}]}
    twice |= {"parameters": {"lambda": 2.0}}
    out = read_model(mergebench.run(mergebench.plan(mergebench.load(twice)), tmp_path / "twice").out)
    plain = read_model(base)
    for name, value in out.items():
        torch.testing.assert_close(value, plain[name] + 2 * (other[name] - plain[name]), rtol=1e-5, atol=1e-6)
    stacked = open_model(f"{base}+{hira}+{hira}").state_dict()  # of what the first one made
    for name, value in stacked.items():
        factor = torch.where(plain[name] != 0, other[name] / plain[name], 1.0)
        torch.testing.assert_close(value, other[name] * factor, rtol=1e-3, atol=1e-4)


def test_the_program_knows_it(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "linear")
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("merge_method: passthrough\nmodels: [{model: base+hira}]\n")
    shown = json.loads(cli("inspect", "base+hira", "--json").out)
    deltas = {one["name"]: one["deltas"] for one in shown["tensors"] if "deltas" in one}
    assert len(deltas) == 6 and set(map(tuple, deltas.values())) == {("multiplicative rank 3",)}
    for command in (("plan", "r.yaml"), ("explain", "r.yaml"), ("merge", "r.yaml", "--out", "out", "--no-eval")):
        assert cli(*command).code == 0, command
    files = [one["file"] for one in json.loads(Path("out/mergebench.json").read_text())["inputs"]]
    assert any(file.endswith("hira/adapter_model.safetensors") for file in files)
    before = open_model("base+hira").delta_digest
    settings = json.loads(Path("hira/adapter_config.json").read_text())
    Path("hira/adapter_config.json").write_text(json.dumps(settings | {"r": 8}))
    assert open_model("base+hira").delta_digest == before  # the file's rank counts


def test_what_does_not_fit(tmp_path: Path) -> None:
    make(tmp_path, "linear")
    config = transformers.LlamaConfig(**LLAMA.to_dict() | {"hidden_size": 32, "head_dim": 16})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="the factors make") as caught:
        open_model(f"{tmp_path / 'other'}+{tmp_path / 'hira'}")
    assert caught.value.hint and "another model" in caught.value.hint
