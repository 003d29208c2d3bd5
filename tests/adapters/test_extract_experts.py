"""A LoRA taken out of a mixture of experts loads in PEFT, whatever ranks its experts and routers have."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import read_model
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mergebench import convert_adapter, extract_adapter
from mergebench.deltas.open import open_model
from tests.deltas.lora_models import CONFIGS


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a fine-tune of it in which an expert of each layer never changed, in both layouts."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param])
    for which in ("base", "tuned"):
        model.save_pretrained(folder / which)
        model.save_pretrained(folder / f"{which}-fused", save_original_format=False)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if value.ndim > 1 and "embed" not in name and "head" not in name:
                    value += 0.1 * torch.randn_like(value) @ torch.diag(0.7 ** torch.arange(value.shape[-1]))
                if "experts" in name:
                    value[1] = transformers.AutoModelForCausalLM.from_pretrained(folder / "base").state_dict()[name][1]
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [{"rank": 16}, {"rank": 2}, {"energy": 0.9}, {"energy": 1.0}], ids=str)
def test_experts_apart(place: Path, tmp_path: Path, size: dict[str, Any]) -> None:
    extract_adapter(str(place / "base"), str(place / "tuned"), tmp_path / "lora", **size)
    base, tuned = (transformers.AutoModelForCausalLM.from_pretrained(place / name) for name in ("base", "tuned"))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with warnings.catch_warnings(record=True) as said:
        found = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload().state_dict()
    assert not any("missing" in str(one.message).lower() for one in said)
    for name, value in tuned.state_dict().items():
        change = (value - before[name]).square().sum()
        lost = (value - found[name]).square().sum()
        assert lost <= change and torch.equal(found[name][1], value[1]) if "experts" in name else True
        if size.get("rank") == 16 or size.get("energy") == 1.0:
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_experts_of_a_converted_adapter(place: Path, tmp_path: Path) -> None:
    """Each expert needs another rank; an unchanged one has none."""
    extract_adapter(str(place / "base"), str(place / "tuned"), tmp_path / "lora", energy=1.0)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if ".experts.1." not in name}
    save_file(kept, file)
    convert_adapter(str(place / "base"), tmp_path / "lora", tmp_path / "out", energy=0.6)
    ours = open_model(f"{place / 'base'}+{tmp_path / 'out'}").state_dict()
    with warnings.catch_warnings(record=True) as said:
        base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
        PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload().save_pretrained(tmp_path / "merged")
    assert not any("missing" in str(one.message).lower() for one in said)
    for name, value in read_model(tmp_path / "merged").items():
        torch.testing.assert_close(value, ours[name], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_experts_fused(place: Path, tmp_path: Path) -> None:
    """Fused experts are left out, which is said; the router is not."""
    made = extract_adapter(str(place / "base-fused"), str(place / "tuned-fused"), tmp_path / "lora", rank=16)
    assert any("experts" in name for name in made.provenance["left_out_tensors"])
    base, tuned = (transformers.AutoModelForCausalLM.from_pretrained(place / name) for name in ("base", "tuned"))
    found = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload().state_dict()
    for name, value in tuned.state_dict().items():
        if "experts" not in name:
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
