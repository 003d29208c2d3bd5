"""Directional ablation, held against the projection by brute force: W - s r r'W, r of length one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import read_model, write_model
from safetensors.torch import load_file
from torch import Tensor

import mergebench
from mergebench.api import plan_edit, plan_patch
from tests.conftest import Cli
from tests.editing.conftest import CONFIG, WIDTH, gated

ALIKE: dict[str, float] = {"rtol": 0, "atol": 1e-6}


def tensors() -> dict[str, Tensor]:
    """Two kinds of matrices that write (embeddings by rows, o_proj and down_proj by columns), and some that read."""
    random = torch.Generator().manual_seed(1)
    found = {name: tensor / 4 for name, tensor in gated(torch.float32).items()}
    for layer in (0, 11):
        found[f"model.layers.{layer}.self_attn.o_proj.weight"] = torch.randn(WIDTH, WIDTH, generator=random) / 4
    return found | {"lm_head.weight": torch.randn(30, WIDTH, generator=random)}


def written(name: str) -> bool:
    return any(part in name for part in ("embed_tokens", "o_proj", "down_proj"))


def by_rows(name: str, tensor: Tensor) -> Tensor:
    """[units, width]: what each unit writes."""
    return tensor if "embed" in name else tensor.T


@pytest.mark.parametrize("strength", [1.0, 0.3, 0.0])
def test_it_is_the_projection(strength: float, tmp_path: Path, probe: Path) -> None:
    model = write_model(tmp_path / "model", tensors(), config=CONFIG)
    mergebench.run(plan_edit(str(model), probe, edit="ablate", strength=strength), tmp_path / "out")
    v = load_file(probe)["weight"][1].double()
    r = v / v.norm()
    after = read_model(tmp_path / "out")
    for name, before in read_model(model).items():
        if not written(name):
            assert torch.equal(after[name], before), name
            continue
        rows = by_rows(name, before).double()
        torch.testing.assert_close(
            by_rows(name, after[name]).double(), rows - strength * (rows @ r)[:, None] * r, **ALIKE
        )
        if strength == 1:
            assert (by_rows(name, after[name]).double() @ r).abs().max() < 1e-6 < (rows @ r).abs().max(), name


def test_nothing_is_written_along_the_direction(tmp_path: Path, probe: Path) -> None:
    """Of a real network, before its final norm: no layer's states have a part along it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.5,
    )  # fmt: skip
    network = transformers.LlamaForCausalLM(config)
    network.save_pretrained(tmp_path / "model")
    mergebench.run(plan_edit(str(tmp_path / "model"), probe, edit="ablate"), tmp_path / "out")
    v = load_file(probe)["weight"][1]
    ids = torch.arange(12)[None]

    def along(place: Path) -> float:
        loaded = transformers.LlamaForCausalLM.from_pretrained(place)
        with torch.inference_mode():
            *states, _ = loaded(ids, output_hidden_states=True).hidden_states
        return max(float((state @ (v / v.norm())).abs().max()) for state in states)

    assert along(tmp_path / "out") < 1e-4 < 0.1 < along(tmp_path / "model")


def test_it_is_undone_to_the_bit(tmp_path: Path, probe: Path) -> None:
    stored = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    model = write_model(tmp_path / "model", stored, config=CONFIG)
    mergebench.run(plan_edit(str(model), probe, edit="ablate"), tmp_path / "out")
    patch = tmp_path / "out" / "patch.safetensors"
    mergebench.run(plan_patch(str(tmp_path / "out"), patch, revert=True), tmp_path / "back")
    before, after = read_model(model), read_model(tmp_path / "back")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_said_of_it(tmp_path: Path, probe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is edited, so none is there by chance; the embeddings are no layer, and go with all layers alone."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model", tensors(), config=CONFIG)
    ran = cli("edit", "model", "--probe", str(probe), "--edit", "ablate", "--dry-run")
    assert ran.code == 0 and ran.err == ""
    for text in ("ablate: 542 of 542 rows of residual", "embed_tokens.weight: 30 rows\n", "emb.     30", "in 2 layers"):
        assert text in ran.out, text
    some = cli("edit", "model", "--probe", str(probe), "--edit", "ablate", "--layers", "0,11", "--dry-run")
    assert "ablate: 112 of 112 rows" in some.out and "embed" not in some.out.replace("embed_tokens", "")
    wrong = cli("edit", "model", "--probe", str(probe), "--edit", "ablate", "--strength", "1.5", "--dry-run")
    assert wrong.code == 2 and "--strength: must be at least 0, at most 1" in wrong.err
