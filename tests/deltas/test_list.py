"""LiST's linear adapters and HiWi's, folded: what the network with them computes is the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from models import read_model
from safetensors.torch import load_file, save_file

from mergebench.adapters import convert_adapter
from mergebench.deltas.formats.native import Writing, write_file
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.conftest import Cli

CONFIG = transformers.RobertaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=20, attn_implementation="eager",
)  # fmt: skip
MODULES = [f"encoder.layer.{i}.{where}" for i in (0, 1) for where in ("attention.output", "output")]


def made(folder: Path, *, whole: bool = False) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Save a base and a checkpoint of adapters; return the network without them and with them."""
    torch.manual_seed(0)
    model = transformers.RobertaModel(CONFIG).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(0, 0.2)
    model.save_pretrained(folder / "base")
    adapters, wrapped = {}, transformers.RobertaModel.from_pretrained(folder / "base").eval()
    for module in MODULES:
        down, up = torch.randn(3, 16) * 0.3, torch.randn(16, 3) * 0.3
        adapters[f"roberta.{module}.adaptation_layer.adapter_proj_1.weight"] = down
        adapters[f"roberta.{module}.adaptation_layer.adapter_proj_2.weight"] = up
        dense = wrapped.get_submodule(f"{module}.dense")
        dense.register_forward_hook(lambda _, __, h, down=down, up=up: h + h @ down.T @ up.T)
    if whole:
        with torch.no_grad():
            wrapped.embeddings.word_embeddings.weight += 1
        adapters |= {f"roberta.{name}": value.clone() for name, value in wrapped.state_dict().items()}
        adapters["roberta.embeddings.position_ids"] = torch.arange(20)
    (folder / "list").mkdir()
    save_file(adapters, folder / "list" / "model.safetensors", {"format": "pt"})
    return model, wrapped


@pytest.mark.parametrize("whole", [False, True], ids=["adapters alone", "the whole checkpoint"])
def test_folded_it_computes_the_same(tmp_path: Path, whole: bool) -> None:
    plain, wrapped = made(tmp_path, whole=whole)
    model = open_model(f"{tmp_path / 'base'}+{tmp_path / 'list'}")
    folded = transformers.RobertaModel(CONFIG).eval()
    folded.load_state_dict(model.state_dict())
    items = torch.arange(12).view(2, 6) + 3
    with torch.no_grad():
        found, expected = folded(items).last_hidden_state, wrapped(items).last_hidden_state
        assert (expected - plain(items).last_hidden_state).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_golden(tmp_path: Path) -> None:
    """T = I + A2 A1: W' = T W, b' = T b."""
    save_file({"x.dense.weight": torch.eye(2), "x.dense.bias": torch.ones(2)}, tmp_path / "base.safetensors")
    name = "x.adaptation_layer.adapter_proj_{}.weight"
    adapters = {name.format(1): torch.tensor([[1.0, 0.0]]), name.format(2): torch.tensor([[0.5], [0.0]])}
    save_file(adapters, tmp_path / "list.safetensors")
    folded = open_model(f"{tmp_path / 'base.safetensors'}+{tmp_path / 'list.safetensors'}").state_dict()
    assert folded["x.dense.weight"].tolist() == [[1.5, 0.0], [0.0, 1.0]]
    assert folded["x.dense.bias"].tolist() == [1.5, 1.0]


def test_as_a_lora_it_is_exact(tmp_path: Path) -> None:
    """Of rank a at most, with the biases saved beside it."""
    made(tmp_path)
    done = convert_adapter(str(tmp_path / "base"), tmp_path / "list", tmp_path / "lora").provenance
    assert {module["rank"] for module in done["modules"].values()} == {3} and done["energy_kept"] == 1
    expected = open_model(f"{tmp_path / 'base'}+{tmp_path / 'list'}").state_dict()
    for name, value in open_model(f"{tmp_path / 'base'}+{tmp_path / 'lora'}").state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["bias"] == "lora_only"


def test_what_is_refused(tmp_path: Path, cli: Cli) -> None:
    made(tmp_path)
    file = tmp_path / "list" / "model.safetensors"
    stored = load_file(file)
    name = f"roberta.{MODULES[0]}.adaptation_layer.adapter_proj_1.weight"
    save_file({key: value for key, value in stored.items() if key != name}, file)
    reference = f"{tmp_path / 'base'}+{tmp_path / 'list'}"
    with pytest.raises(ModelError, match="this one has one"):
        open_model(reference)
    save_file(stored | {name: torch.ones(3, 24)}, file)
    with pytest.raises(ModelError, match="not behind the layer but beside it"):
        open_model(reference)
    save_file(stored | {"cls.weight": torch.ones(2, 16)}, file)
    code, _, err = cli("inspect", reference)
    assert code == 3 and "it brings a part 'cls.weight'" in err


def test_hiwi_on_weights_and_biases(tmp_path: Path) -> None:
    """W' = W + B f(A W), b' = b + B f(A b) over the outputs; nothing at the start, of rank r at most after it."""
    base = read_model(_saved(tmp_path))
    up, down = torch.randn(24, 2), torch.randn(2, 24)
    for b in (torch.zeros_like(up), up):
        one = {"b": b, "a": down}
        writings = {
            "fc.weight": Writing("peanut", {"activation": "relu"}, one),
            "fc.bias": Writing("peanut", {"activation": "relu", "columns": True}, one),
        }
        write_file(tmp_path / "hiwi.safetensors", writings)
        folded = open_model(f"{tmp_path / 'base'}+{tmp_path / 'hiwi.safetensors'}").state_dict()
        for name, value in base.items():
            exact = value.double() + b.double() @ torch.relu(down.double() @ value.double())
            torch.testing.assert_close(folded[name], exact.float(), rtol=1e-5, atol=1e-5)
            assert torch.equal(folded[name], value) == (not b.any())
    assert torch.linalg.matrix_rank(folded["fc.weight"] - base["fc.weight"], rtol=1e-4) <= 2


def _saved(folder: Path) -> Path:
    torch.manual_seed(1)
    (folder / "base").mkdir()
    tensors = {"fc.weight": torch.randn(24, 16), "fc.bias": torch.randn(24)}
    save_file(tensors, folder / "base" / "model.safetensors", {"format": "pt"})
    return folder / "base"
