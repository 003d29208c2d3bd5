"""How much deltas change, against the folded model; and what is said of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergebench.adapters.share import changed_share, module_kind
from mergebench.deltas.open import open_model
from tests.conftest import Cli
from tests.deltas.kinds import write_adapter
from tests.models import write_model

NAMES = ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "lm_head"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, and adapters of all its matrices but the last: LoRA, DoRA."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    base = {f"{name}.weight": torch.randn(24, 16) for name in NAMES}
    write_model(tmp_path / "base", base)
    write_adapter(tmp_path / "lora", base, NAMES[:3])
    write_adapter(tmp_path / "dora", base, NAMES[:3], use_dora=True)
    return tmp_path


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("tile", [1 << 17, 32])
def test_it_is_the_change_of_the_folded_model(
    here: Path, adapter: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding where all is measured; a part of a tensor stands for all of it."""
    monkeypatch.setattr("mergebench.checkpoint.delta.TILE", tile)
    model = open_model(f"base+{adapter}")
    folded, base = model.state_dict(), open_model("base").state_dict()
    shares = changed_share(model)
    groups = {"all": NAMES[:3], "attention": NAMES[:1], "MLP": NAMES[1:3]}
    assert shares.keys() == groups.keys()
    for group, names in groups.items():
        changed, plain = (torch.cat([one[f"{n}.weight"].double().flatten() for n in names]) for one in (folded, base))
        expected = float((changed - plain).norm() / plain.norm())
        assert shares[group].share == pytest.approx(expected, rel=1e-5 if tile > 1000 else 0.3)
        assert shares[group].tensors == len(names)


def test_commands_say_it(here: Path, cli: Cli) -> None:
    shown = cli("inspect", "base+lora")
    assert re.search(r"changes \d+% of \|W\| in 3 tensors \(MLP \d+%, attention \d+%\)", shown.out) and not shown.err
    assert json.loads(cli("inspect", "base+lora", "--json").out)["changed"]["MLP"]["tensors"] == 2
    assert "changed" not in json.loads(cli("inspect", "base", "--json").out)
    Path("r.yaml").write_text("merge_method: passthrough\nmodels: [{model: base+lora}]\n")
    assert "base+lora changes " in cli("merge", "r.yaml", "--no-eval").err
    assert "changes " in cli("adapters", "fold", "lora", "--base", "base", "--out", "out").err


def test_an_adapter_that_does_nothing(here: Path, cli: Cli) -> None:
    """Of which B is zero still, in one kind of module: that one is named."""
    file = here / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    idle = next(name for name in tensors if "q_proj" in name and "lora_B" in name)
    save_file(tensors | {idle: torch.zeros_like(tensors[idle])}, file)
    shown = cli("inspect", "base+lora")
    assert "warning: base+lora changes nothing at all of: attention. Was it trained?" in shown.err
    save_file(tensors | {idle: 1e-8 * tensors[idle]}, file)
    assert "changes almost nothing of: attention" in cli("inspect", "base+lora").err


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.h.0.mlp.c_fc.weight", "MLP"),
        ("transformer.h.0.ln_1.weight", "norms"),
        ("model.layers.0.post_attention_layernorm.weight", "norms"),
        ("model.layers.0.mlp.experts.3.w1.weight", "experts"),
        ("model.layers.0.mlp.experts.gate_up_proj", "experts"),
        ("model.embed_tokens.weight", "embeddings"),
        ("transformer.wte.weight", "embeddings"),
        ("bert.encoder.layer.0.output.dense.weight", "MLP"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "attention"),
        ("bert.encoder.layer.0.output.LayerNorm.weight", "norms"),
        ("lm_head.weight", "head"),
        ("score.weight", "head"),
        ("visual.patch.proj.weight", "other"),
    ],
)
def test_kinds_of_module(name: str, kind: str) -> None:
    assert module_kind(name) == kind
