"""One budget of singular values over the matrices of a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from mergebench.adapters import truncate_adapter
from mergebench.adapters.truncate import allocate
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError, RecipeError, RunError
from tests.adapters.test_convert import as_peft_merges
from tests.conftest import Cli
from tests.deltas import peft_types

LORA = LoraConfig(r=6, lora_alpha=9, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    peft_types.make(tmp_path, "llama", LORA)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def differences(reference: str) -> dict[str, torch.Tensor]:
    base, model = open_model("base").state_dict(), open_model(reference).state_dict()
    return {name: (model[name] - value).double() for name, value in base.items() if not torch.equal(model[name], value)}


@pytest.mark.parametrize("budget", [1, 7, 20, 36, 0.5])
def test_the_largest_of_all_are_kept(here: Path, budget: int | float) -> None:
    """By brute force: every matrix decomposed, the largest values of all of them picked."""
    before = differences("base+adapter")
    values = sorted((float(v), name) for name, d in before.items() for v in torch.linalg.svdvals(d)[:6])
    count = budget if isinstance(budget, int) else 18
    chosen = [name for _, name in values[-count:]]
    done = truncate_adapter("adapter", "out", budget=budget).provenance
    after = differences("base+out")
    for name, difference in before.items():
        rank = chosen.count(name)
        assert done["modules"][name.removesuffix(".weight")]["rank"] == rank
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        expected = (u[:, :rank] * s[:rank]) @ v[:rank]
        torch.testing.assert_close(after.get(name, torch.zeros_like(expected)), expected, rtol=1e-4, atol=1e-5)
    everything = sum(float(d.square().sum()) for d in before.values())
    assert done["energy_kept"] == pytest.approx(sum(v * v for v, _ in values[-count:]) / everything, rel=1e-5)
    merged = as_peft_merges(here, here / "out")
    for name, value in open_model("base+out").state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-5)


def test_allocate_by_hand() -> None:
    values = {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([4.0, 3.0, 1.0]), "c": torch.tensor([0.5])}
    assert [list(allocate(values, n).values()) for n in (1, 3, 4, 6)] == [[1, 0, 0], [1, 2, 0], [2, 2, 0], [2, 3, 1]]


def test_from_the_command_line(here: Path, cli: Cli) -> None:
    done = cli("adapters", "truncate", "adapter", "--budget", "50%", "--out", "out")
    assert done.code == 0 and "truncated to 18 of 36" in done.err and done.out == "out\n"
    shown = cli("adapters", "inspect", "out").out
    assert "rank of each module" in shown and "self_attn.q_proj" in shown
    assert "rank of each module" not in cli("adapters", "inspect", "adapter").out
    said = json.loads(cli("adapters", "truncate", "adapter", "--budget", "3", "--out", "o2", "--json").out)
    assert said["budget"] == 3 and said["of"] == 36
    for wrong in ("0", "37", "many", "0%", "101%"):
        refused = cli("adapters", "truncate", "adapter", "--budget", wrong, "--out", "o3")
        assert refused.code == 2 and "--budget" in refused.err and not Path("o3").exists(), wrong


def test_what_has_no_budget(here: Path) -> None:
    for folder, config in (("dora", {"use_dora": True}), ("whole", {"modules_to_save": ["lm_head"]})):
        peft_types.make(here / folder, "llama", LoraConfig(r=2, target_modules=["q_proj"], **config))
        with pytest.raises(ModelError, match=r"no product of two factors|saved whole"):
            truncate_adapter(here / folder / "adapter", "out", budget=1)
    with pytest.raises(RecipeError, match="from 1 to 36"):
        truncate_adapter("adapter", "out", budget=1.5)
    file = here / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: tensors[name] * torch.nan}, file)
    with pytest.raises(RunError, match="NaN or infinity"):
        truncate_adapter("adapter", "out", budget=1)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("part", "config"),
    [
        ("trained tokens", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 4]}}),
        ("bare parameters", {"target_modules": ["q_proj"], "target_parameters": ["down_proj.weight"]}),
    ],
)
def test_no_part_is_lost(tmp_path: Path, part: str, config: dict[str, Any]) -> None:
    """What has no factors of its own cannot be cut, and is not left out without a word."""
    peft_types.make(tmp_path, "llama", LoraConfig(r=2, **config))
    with pytest.raises(ModelError, match=part):
        truncate_adapter(tmp_path / "adapter", tmp_path / "out", budget=1)
    assert not (tmp_path / "out").exists()


def test_embeddings_stay_embeddings(tmp_path: Path) -> None:
    """All singular values kept, it is the same adapter."""
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    expected = peft_types.make(tmp_path, "llama", config)
    truncate_adapter(tmp_path / "adapter", tmp_path / "out", budget=1.0)
    for name, value in as_peft_merges(tmp_path, tmp_path / "out").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
