"""Other weights put in the place of a module's: bit for bit what building it anew gives."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import pytest
import torch

from mergebench.networks.network import Network
from mergebench.networks.onednn import PackedLinear
from tests.evaluation.conftest import Files, write_encoder

CPU = torch.device("cpu")
TOKENS = [[2, 7, 9, 30, 3], [2, 11, 3]]


def states(network: Network) -> torch.Tensor:
    with torch.inference_mode():
        return network.encode(TOKENS)[0]


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "bert with a head"])
def test_taking_the_place_of_another(family: str, tmp_path: Path) -> None:
    first, second = (Files(write_encoder(tmp_path / name, family, seed), name) for seed, name in enumerate("ab"))
    network, anew = Network(first, "AutoModel", CPU), Network(second, "AutoModel", CPU)
    before = states(network)
    module = network.module
    assert network.take(second)
    assert network.module is module
    assert network.name == "b"
    assert torch.equal(states(network), states(anew))
    assert not torch.equal(states(network), before)
    assert network.take(first)
    assert torch.equal(states(network), before)


def test_every_tensor_is_put(tmp_path: Path) -> None:
    """One tensor changed at a time is seen in the output, also one packed for oneDNN."""
    path = write_encoder(tmp_path / "a")
    network = Network(Files(path), "AutoModel", CPU)
    tensors = Files(path).state_dict()
    before = states(network)
    for name in tensors:
        if "pooler" in name or name.endswith("key.bias"):  # a shift of all scores alike
            continue
        changed = {
            **tensors,
            name: tensors[name] + torch.linspace(0.3, 0.9, tensors[name].numel()).view_as(tensors[name]),
        }
        assert network._weights.put(changed)
        assert not torch.equal(states(network), before), name
    assert network._weights.put(tensors)
    assert torch.equal(states(network), before)


def test_what_was_packed_is_gone(tmp_path: Path) -> None:
    """One copy of a model is in memory, not the packed one beside what it was made of."""
    model = Files(write_encoder(tmp_path / "a"))
    network = Network(model, "AutoModel", CPU)
    gc.collect()
    shape = model.state_dict()["encoder.layer.0.intermediate.dense.weight"].shape
    with warnings.catch_warnings(action="ignore"):
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.nn.Parameter) and one.shape == shape]
    assert tensors == []
    assert states(network).isfinite().all()


def test_tied_tensors_change_together(tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            **sizes, intermediate_size=24, tie_word_embeddings=True, initializer_range=0.5
        )
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / str(seed))
        paths.append(tmp_path / str(seed))
    network, anew = (Network(Files(path), "AutoModelForCausalLM", CPU) for path in paths)
    ids = torch.tensor([[3, 5, 7]])
    assert network.take(Files(paths[1]))
    with torch.inference_mode():
        assert torch.equal(network.module(ids).logits, anew.module(ids).logits)


def test_another_architecture_is_not_taken(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "bert")
    network = Network(Files(encoder), "AutoModel", CPU)
    before = states(network)
    assert not network.take(Files(write_encoder(tmp_path / "r", "roberta")))
    fewer = Files(encoder).state_dict()
    del fewer["embeddings.word_embeddings.weight"]
    assert not network._weights.put(fewer)
    assert torch.equal(states(network), before)


def test_what_transformers_converts_is_built_anew(tmp_path: Path) -> None:
    """Experts lie one by one in the files and fused in memory: no tensor has a place of its own."""
    first, second = (Files(write_encoder(tmp_path / name, "mixtral", seed), name) for seed, name in enumerate("ab"))
    assert not Network(first, "AutoModel", CPU).take(second)


def test_what_transformers_only_renames_is_put(tmp_path: Path) -> None:
    """DINOv2's files say attention.attention.query where the module says attention.q_proj."""
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12, "patch_size": 4}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        transformers.Dinov2Model(transformers.Dinov2Config(**sizes, mlp_ratio=2)).save_pretrained(tmp_path / name)
    first, second = (Files(tmp_path / name, name) for name in "ab")
    network, anew = (Network(model, "AutoModel", CPU) for model in (first, second))
    image = torch.linspace(-1, 1, 3 * 12 * 12).view(1, 3, 12, 12)
    layer = "encoder.layer.0.attention"
    assert f"{layer}.attention.query.weight" in first.state_dict()
    assert network.holder(f"{layer}.attention.query.weight") is network.module.get_submodule(f"{layer}.q_proj")
    assert network.take(second)
    with torch.inference_mode():
        assert torch.equal(*(one.module(image).last_hidden_state for one in (network, anew)))


def test_another_tokenizer_is_read(tmp_path: Path) -> None:
    first, second = (write_encoder(tmp_path / name) for name in "ab")
    text = (second / "tokenizer.json").read_text()
    (second / "tokenizer.json").write_text(text.replace('"w1":5', '"w1":6').replace('"w1": 5', '"w1": 6'))
    assert (second / "tokenizer.json").read_text() != text
    network = Network(Files(first), "AutoModel", CPU)
    assert network.tokenize(["w1"], 8) == [[2, 5, 3]]
    assert network.take(Files(second, "b"))
    assert network.tokenize(["w1"], 8) == [[2, 6, 3]]


def test_gradients_of_what_is_packed() -> None:
    """Those of torch's own layer, also after other weights took the place; nothing reaches the weights."""
    layers = [torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)]
    packed = PackedLinear(layers[0])
    x = torch.randn(5, 3, 6, requires_grad=True)
    slope = torch.randn(3, 5, 4).transpose(0, 1)
    for layer in layers:
        packed.put("weight", layer.weight.detach())
        packed.put("bias", layer.bias.detach())
        one, other = (torch.autograd.grad(which(x), x, slope)[0] for which in (layer, packed))
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), layers[1](x))
    assert torch.equal(packed.weight, layers[1].weight) and not packed.weight.requires_grad
    packed.weight.mul_(2)  # read, and changed: an ordinary layer
    torch.testing.assert_close(packed(x) - packed.bias, 2 * (layers[1](x) - layers[1].bias))
    bare = torch.nn.Linear(6, 4, bias=False)
    torch.testing.assert_close(PackedLinear(bare)(x), bare(x))
