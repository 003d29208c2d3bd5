"""A QLoRA adapter on the base as its training saw it: bitsandbytes 0.50.2's rounding to NF4 is the oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import read_model
from peft import LoraConfig
from safetensors.torch import save_file

import mergebench
from mergebench.checkpoint.files import Files
from mergebench.deltas.nf4 import VALUES, nf4
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError, RecipeError
from tests.conftest import Cli
from tests.deltas import peft_types

# of the weight below: elements 61 to 68, across the border of two blocks, and the sum of all squares
GOLDEN = [
    -0.05555495619773865, 0.08607614040374756, -0.13597515225410461, -0.03556641936302185, 0.21977226436138153,
    -0.27195030450820923, 0.03108605369925499, 0.2824050188064575,
]  # fmt: skip
SQUARES = 6.624638653368651
LORA = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=False)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Every element to the nearest value of its block, by brute force."""
    values = torch.tensor(VALUES, dtype=torch.float64)
    out = []
    for block in weight.double().reshape(-1).split(64):
        scale = block.abs().max()
        nearest = ((block / scale)[:, None] - values).abs().argmin(1)
        out.append(values[nearest] * scale)
    return torch.cat(out).view(weight.shape).float()


def test_as_bitsandbytes_rounds(tmp_path: Path) -> None:
    at = torch.arange(150)
    weight = (((at * 37) % 101 - 50) * (1 + at // 64)).float() / 256
    save_file({"layer.weight": weight.view(3, 50)}, tmp_path / "base.safetensors")
    model = replace(open_model(str(tmp_path / "base.safetensors")), deltas={"layer.weight": (nf4.on((3, 50), {}),)})
    with Files() as files:
        found = model.values(files).whole("layer.weight").view(-1)
    assert torch.equal(found[61:69], torch.tensor(GOLDEN))
    assert float(found.double().square().sum()) == pytest.approx(SQUARES, rel=1e-12)
    assert torch.equal(found.view(3, 50), rounded(weight.view(3, 50)))


def test_the_layers_are_rounded_and_nothing_else(tmp_path: Path, cli: Cli) -> None:
    folded = peft_types.make(tmp_path, "llama", LORA)
    base = read_model(tmp_path / "base")
    code, _, err = cli(
        "adapters", "fold", tmp_path / "adapter", "--base", tmp_path / "base", "--as-trained", "nf4",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0 and f"folded into 2 tensors of {tmp_path / 'base'}, rounded to NF4" in err
    for name, value in read_model(tmp_path / "out").items():
        linear = name.endswith("proj.weight")
        expected = (rounded(base[name]) if linear else base[name]) + (folded[name] - base[name])
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        assert linear or torch.equal(value, base[name]), name
    code, _, err = cli(
        "adapters", "fold", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "plain"
    )
    assert code == 0 and f"folded into 2 tensors of {tmp_path / 'base'}, as it is" in err


def test_beside_the_same_adapter_on_the_base_as_it_is(tmp_path: Path) -> None:
    """As two models of one recipe; the task vector of the rounded one holds the rounding."""
    folded = peft_types.make(tmp_path, "llama", LORA)
    base, reference = read_model(tmp_path / "base"), f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"
    recipe = mergebench.load(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(tmp_path / "base"),
            "models": [{"model": reference, "as_trained": "nf4"}, {"model": reference}],
            "parameters": {"lambda": 0.5},
        }
    )
    assert mergebench.load(recipe.to_dict()) == recipe
    out = read_model(mergebench.run(mergebench.plan(recipe, device="cpu"), tmp_path / "out").out)
    for name, value in out.items():
        moved = folded[name] - base[name]
        own = rounded(base[name]) - base[name] if name.endswith("proj.weight") else 0
        torch.testing.assert_close(value, base[name] + 0.5 * (2 * moved + own), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "how", "says"),
    [
        ("base+adapter", "int4", "as_trained: must be nf4, got 'int4'"),
        ("base", "nf4", "no adapter is named"),
        ("base+adapter+adapter", "nf4", "for one adapter on a base"),
    ],
)
def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, how: str, says: str) -> None:
    peft_types.make(tmp_path, "llama", LORA)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ModelError, RecipeError)) as error:
        mergebench.plan(
            mergebench.load({"merge_method": "passthrough", "models": [{"model": model, "as_trained": how}]})
        )
    assert says in str(error.value)


def test_layers_stored_the_other_way_are_refused(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "gpt2", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(ModelError, match="stored"):
        mergebench.api.plan_fold(str(tmp_path / "base"), tmp_path / "adapter", as_trained="nf4")
