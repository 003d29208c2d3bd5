"""States of the residual stream are those of transformers, bit for bit; pooled, they do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mergebench.deltas.open import open_model
from mergebench.editing.probes.layers import PRE, Reading, every_state, features, pooling, stream
from mergebench.errors import ModelError, RecipeError, RunError
from mergebench.networks.features import Texts
from mergebench.networks.network import Network
from tests.evaluation.conftest import write_encoder
from tests.language import write_decoder

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TOKENS = [[3, 5, 7, 9], [4, 8], [6, 7, 8, 9, 10, 11, 12]]
SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64, "initializer_range": 0.4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 50,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "gpt_neox, attention and MLP side by side": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**SIZES)
    ),
    "gemma2, scaled embeddings": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=3)
    ),
}  # fmt: skip


def save(directory: Path, family: str) -> Path:
    torch.manual_seed(0)
    module = FAMILIES[family]()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:  # a norm that scales by one hides which side of it a state is from
                parameter.add_(0.3 * torch.randn_like(parameter))
    module.save_pretrained(directory)
    return directory


def states(
    network: Network, how: Callable[[Tensor, Tensor], Tensor] = lambda states, mask: states.clone()
) -> list[Tensor]:
    with torch.inference_mode(), stream(network, how, every_state(network)) as read:
        return read(TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_hidden_states(family: str, tmp_path: Path) -> None:
    path = save(tmp_path / "m", family)
    network = Network(open_model(str(path)), "AutoModel", CPU)
    ids, mask = network.padded(TOKENS)
    with torch.inference_mode():
        wanted = network.module(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    found = states(network)
    assert len(wanted) == 4
    for one, other in zip(found[:4], wanted, strict=True):
        assert torch.equal(one, other)
    assert len({one.sum().item() for one in found[:4]}) == 4


@pytest.mark.parametrize(("family", "norm"), [("llama", "norm"), ("gpt2", "ln_f"), ("bert", None)])
def test_before_the_final_norm(family: str, norm: str | None, tmp_path: Path) -> None:
    network = Network(open_model(str(save(tmp_path / "m", family))), "AutoModel", CPU)
    *_, post, pre = states(network)
    if norm is None:
        assert torch.equal(pre, post)
    else:
        assert not torch.allclose(pre, post, atol=0.1)
        with torch.inference_mode():
            assert torch.equal(getattr(network.module, norm)(pre), post)


def test_with_a_head_on_top(tmp_path: Path) -> None:
    """The same states from a network that also gives logits."""
    for family in ("llama", "gpt2"):
        model = open_model(str(save(tmp_path / family, family)))
        bare, headed = (Network(model, kind, CPU) for kind in ("AutoModel", "AutoModelForCausalLM"))
        assert all(torch.equal(one, other) for one, other in zip(states(bare), states(headed), strict=True))


TEXTS = ["the cat eats", "a", "under the water the fish says what a bird says under the water", "dog dog", "é?", "fish"]


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize(
    ("write", "layer", "norm"),
    [(write_decoder, -1, "post"), (write_decoder, -1, "pre"), (write_decoder, 1, "post"), (write_decoder, 0, "pre"),
     (write_encoder, 2, "post"), (write_encoder, -2, "post")],
)  # fmt: skip
def test_features_equal_texts_alone(
    pool: str, write: Callable[[Path], Path], layer: int, norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each text by itself through transformers, special tokens counted; here in batches of several, on threads."""
    path = write(tmp_path / "m")
    module = transformers.AutoModel.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    wanted = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, max_length=20, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            if norm == "pre" and layer == -1:
                caught: list[Tensor] = []
                handle = module.norm.register_forward_pre_hook(lambda _, args, caught=caught: caught.append(args[0]))
                module(input_ids=ids)
                handle.remove()
                state = caught[0][0]
            else:
                state = module(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]
        wanted.append(state.mean(0) if pool == "mean" else state[-1])
    network = Network(open_model(str(path)), "AutoModel", CPU)
    torch.set_num_threads(3)
    for tokens in (45, 1, 4096):
        monkeypatch.setattr("mergebench.networks.features.CPU_TOKENS", tokens)
        found = features(network, Texts(TEXTS, 20), Reading(layer, norm, pool, 20), lambda items: None)
        assert torch.allclose(found, torch.stack(wanted), atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_padding_on_either_side_is_passed_over(pool: str) -> None:
    rows = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    found = pooling(pool)(rows, mask)
    for one, row, keep in zip(found, rows, mask, strict=True):
        kept = row[keep.bool()]
        assert torch.allclose(one, kept.mean(0) if pool == "mean" else kept[-1], atol=1e-6)


def test_which_layer() -> None:
    assert [Reading(layer).state(4) for layer in (0, 3, 4, -1, -2, -5)] == [0, 3, 4, 4, 3, 0]
    assert [Reading(layer, "pre").state(4) for layer in (0, 3, 4, -1, -2)] == [0, 3, PRE, PRE, 3]
    for layer in (5, -6):
        with pytest.raises(RecipeError, match=f"layer {layer}: the model has 4 blocks"):
            Reading(layer).state(4)


def test_models_without_one_stack_of_blocks(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    transformers.T5Model(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="it is an encoder with a decoder"):
        every_state(Network(open_model(str(tmp_path / "t5")), "AutoModel", CPU))
    albert = transformers.AlbertConfig(**SIZES, embedding_size=8)  # one block, run three times
    transformers.AlbertModel(albert).save_pretrained(tmp_path / "albert")
    with pytest.raises(ModelError, match="its blocks are not to be found"):
        every_state(Network(open_model(str(tmp_path / "albert")), "AutoModel", CPU))


def test_a_model_that_is_not_finite(tmp_path: Path) -> None:
    network = Network(open_model(str(write_decoder(tmp_path / "m"))), "AutoModel", CPU)
    with torch.no_grad():
        network.module.norm.weight[3] = torch.nan
    with pytest.raises(RunError, match="its outputs are not finite"):
        features(network, Texts(TEXTS, 20), Reading(), lambda items: None)
    assert features(network, Texts(TEXTS, 20), Reading(1), lambda items: None).isfinite().all()
