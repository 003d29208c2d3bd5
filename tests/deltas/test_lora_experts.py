"""LoRA of experts: PEFT's bare parameters on bases with experts apart and fused, and factors of single experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from models import read_model, write_model

import mergebench
from mergebench.checkpoint import delta as protocol
from mergebench.checkpoint.files import Files
from mergebench.deltas.open import open_model
from mergebench.deltas.verbs import materialise
from mergebench.errors import ModelError
from tests.deltas import lora_models as lora

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "experts and router": {"r": 2, "target_modules": ["q_proj"], "target_parameters": [*BOTH, "gate.weight"]},
    "one parameter": {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]},
    "all linear": {"r": 2, "target_modules": "all-linear", "lora_alpha": 6},
    "patterns": {
        "r": 2, "target_modules": ["q_proj"], "target_parameters": BOTH, "use_rslora": True,
        "rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {"experts.gate_up_proj": 5},
    },
}  # fmt: skip


@pytest.mark.parametrize("stored", ["apart", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_bare_parameters(tmp_path: Path, case: str, stored: str) -> None:
    lora.save_base(tmp_path, "mixtral", save_original_format=stored == "apart")
    lora.save_lora(tmp_path, **CASES[case])
    names = {name for name in read_model(tmp_path / "base") if ".experts." in name}
    assert len(names) == (2 * 2 if stored == "fused" else 2 * 9)
    if stored == "fused":
        _fuse_folded(tmp_path)
    changed = lora.check(tmp_path)
    wanted = names if case != "one parameter" else {name for name in names if "w2" in name or "down_proj" in name}
    assert changed & names == wanted


def _fuse_folded(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "folded")
    model.save_pretrained(folder / "folded", save_original_format=False)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_other_mixtures(tmp_path: Path, family: str) -> None:
    """GPT-OSS stores experts [in, out]."""
    lora.save_base(tmp_path, family)
    lora.save_lora(tmp_path, r=2, target_modules=["q_proj"], target_parameters=BOTH)
    changed = lora.check(tmp_path)
    assert sum(".experts." in name for name in changed) == (4 if family == "gpt_oss" else 18)


@pytest.mark.parametrize("stored", ["apart", "fused"])
@pytest.mark.parametrize("tile", [7, 16 * 12, 1 << 17])
def test_tiles_change_no_bit(tmp_path: Path, tile: int, stored: str) -> None:
    lora.save_base(tmp_path, "mixtral", save_original_format=stored == "apart")
    lora.save_lora(tmp_path, **CASES["one parameter"])
    expected = lora.merged(tmp_path, "expected")
    with mock.patch.object(protocol, "TILE", tile):
        model = open_model(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
        base = read_model(tmp_path / "base")
        with Files() as files:
            for name, (delta,) in model.deltas.items():
                difference = materialise(files, delta)
                torch.testing.assert_close(base[name] + difference, expected[name], rtol=1e-6, atol=1e-6)
                assert delta.resident() > 0 and "rank 2" in delta.describe()


def _as_before_0_19(folder: Path, version: str | None) -> None:
    """The factors as PEFT 0.18 lays them out: A and B change places, the product is the transpose."""
    found = lora.tensors(folder)
    for name in [name for name in found if ".experts." in name and "lora_A" in name]:
        a, b = found[name], found[name.replace("lora_A", "lora_B")]
        count = 3
        rank = a.shape[0] // count
        turned_a = b.view(b.shape[0], rank, count).permute(2, 1, 0).reshape(count * rank, -1)
        turned_b = a.view(count, rank, -1).permute(2, 1, 0).reshape(-1, rank * count)
        found[name], found[name.replace("lora_A", "lora_B")] = turned_a, turned_b
    lora.write(folder, found)
    lora.change(folder, peft_version=version)


@pytest.mark.parametrize("stored", ["apart", "fused"])
def test_factors_of_an_older_peft(tmp_path: Path, stored: str) -> None:
    """The shapes tell them, whatever the version says."""
    lora.save_base(tmp_path, "mixtral", save_original_format=stored == "apart")
    lora.save_lora(tmp_path, **CASES["experts and router"])
    if stored == "fused":
        _fuse_folded(tmp_path)
    _as_before_0_19(tmp_path, None)
    lora.check(tmp_path)


@pytest.mark.parametrize(("version", "older"), [("0.18.1", True), ("0.21.2", False), ("0.19.1.dev0@abc", False)])
def test_square_experts_go_by_the_version(tmp_path: Path, version: str, older: bool) -> None:
    lora.save_base(tmp_path, "square")
    lora.save_lora(tmp_path, **CASES["one parameter"])
    if older:
        _as_before_0_19(tmp_path, version)
    lora.change(tmp_path, peft_version=version)
    lora.check(tmp_path)
    lora.change(tmp_path, peft_version=None)
    with pytest.raises(ModelError, match="square, and no peft_version"):
        lora.merged(tmp_path, "no")


def test_square_experts_go_by_other_parameters(tmp_path: Path) -> None:
    lora.save_base(tmp_path, "square")
    lora.save_lora(tmp_path, r=2, target_modules=[], target_parameters=BOTH)
    lora.change(tmp_path, peft_version=None)
    lora.check(tmp_path)


def _single(folder: Path, words: bool = True) -> dict[str, torch.Tensor]:
    """A LoRA of every expert's matrices, of other ranks and scales; the base apart, and what it gives."""
    base, factors, expected = read_model(folder / "base"), {}, {}
    torch.manual_seed(2)
    for name, value in base.items():
        expected[name] = value
        if ".experts." in name and ".1." not in name.partition(".experts")[2]:
            rank = 3 if ".w3." in name else 2
            b, a = torch.randn(value.shape[0], rank), torch.randn(rank, value.shape[1])
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            expected[name] = value + (8 if ".w1." in name else 4) / rank * b @ a
    (folder / "lora").mkdir()
    lora.write(folder, factors)
    (folder / "lora" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"w1": 8}}'
    )
    return expected


def test_single_experts_on_a_fused_base(tmp_path: Path) -> None:
    lora.save_base(tmp_path, "mixtral")
    write_model(tmp_path / "folded", _single(tmp_path))
    for name in ("config.json",):
        (tmp_path / "folded" / name).write_text((tmp_path / "base" / name).read_text())
    _fuse_folded(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in lora.check(tmp_path))


def test_single_experts_merge_on_a_fused_base(tmp_path: Path) -> None:
    lora.save_base(tmp_path, "mixtral")
    expected = _single(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "fused"),
        "models": [{"model": f"{tmp_path / 'base'}+{tmp_path / 'lora'}", "parameters": {"weight": 0.5}}],
    }
    out = mergebench.run(mergebench.plan(mergebench.load(recipe), device="cpu"), tmp_path / "out").out
    found, base = read_model(out), read_model(tmp_path / "base")
    for layer in range(2):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        halves = {name: (base[name] + expected[name]) / 2 for name in base if name.startswith(prefix)}
        down = torch.stack([halves[f"{prefix}.{number}.w2.weight"] for number in range(3)])
        both = torch.stack(
            [torch.cat([halves[f"{prefix}.{number}.{word}.weight"] for word in ("w1", "w3")]) for number in range(3)]
        )
        ours = {name.rpartition(".")[2]: value for name, value in found.items() if f"layers.{layer}." in name}
        torch.testing.assert_close(ours["down_proj"], down, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours["gate_up_proj"], both, rtol=1e-5, atol=1e-6)


def test_refused(tmp_path: Path) -> None:
    """Factors that fit no parameter, or more than one."""
    lora.save_base(tmp_path, "mixtral")
    lora.save_lora(tmp_path, r=2, target_modules=[], target_parameters=BOTH)
    found = lora.tensors(tmp_path)
    lora.write(tmp_path, {n: v[:, :-1] if "lora_A" in n and "base_layer" in n else v for n, v in found.items()})
    with pytest.raises(ModelError, match=r"experts: factors \[6, 15\].* do not fit 'model"):
        lora.merged(tmp_path)
    lora.write(tmp_path, {name: value for name, value in found.items() if "base_layer" not in name})
    with pytest.raises(ModelError, match=r"1 pairs of factors, the base has 2"):
        lora.merged(tmp_path)
    lora.write(tmp_path, {name: value for name, value in found.items() if "lora_B" not in name})
    with pytest.raises(ModelError, match="only one of lora_A and lora_B"):
        lora.merged(tmp_path)


def test_more_experts_than_the_base(tmp_path: Path) -> None:
    lora.save_base(tmp_path, "mixtral")
    _single(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    found = lora.tensors(tmp_path)
    lora.write(tmp_path, {name.replace("experts.2.", "experts.7."): value for name, value in found.items()})
    with pytest.raises(ModelError, match=r"experts\.7\.w1: the base has \[3, 48, 16\] experts"):
        lora.merged(tmp_path)
