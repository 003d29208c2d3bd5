"""What is known of a tensor that one file has and another lacks: by hand, and of a model that transformers builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergebench.checkpoint.architecture import Architecture, Facts
from mergebench.checkpoint.header import TensorInfo

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 12, "tie_word_embeddings": True,
}  # fmt: skip
LAYER = [f"self_attn.{one}_proj" for one in "qkvo"] + [f"mlp.{one}_proj" for one in ("gate", "up", "down")]
NAMES = [
    *("model.embed_tokens.weight", "model.norm.weight"),
    *(f"model.layers.0.{one}.weight" for one in [*LAYER, "input_layernorm", "post_attention_layernorm"]),
]


def info(name: str, *shape: int, dtype: str = "F32") -> TensorInfo:
    return TensorInfo(name, dtype, shape or (8, 8), Path("x"), 0, 0)


def facts(names: list[str] = NAMES, **changes: Any) -> Facts:
    return Facts(LLAMA | changes, {name: info(name) for name in names})


def test_names_with_and_without_the_models_prefix() -> None:
    known = Architecture("bert", frozenset({"bert.a", "b"}), {}, frozenset({"bert.ids", "bert.a"}), (r"position",))
    assert [known.find(name) for name in ("bert.a", "a", "b", "bert.b", "c")] == ["bert.a", "bert.a", "b", "b", None]
    # a buffer that a file holds is read; so is a tensor whose name fits the pattern of old files
    assert [known.passes_over(name) for name in ("ids", "bert.ids", "a", "c")] == [True, True, False, False]
    known = known._replace(stored=frozenset({"bert.position"}))
    assert [known.passes_over(name) for name in ("position", "old.position")] == [False, True]


@pytest.mark.parametrize(
    ("tensor", "idle"),
    [
        (info("model.rotary_emb.inv_freq", 2), True),  # a buffer that no file holds
        (info("model.layers.0.self_attn.bias", 1, 1, 9, 9), True),
        (info("model.conv.weight", 1, 1, 9, 9), False),
        (info("mask", 1, 1, 1, 1), False),
        (info("mask", 1, 1, 9, 8), False),
        (info("mask", 2, 1, 9, 9), False),
        (info("model.layers.0.self_attn.q_proj.bias", 8), False),
        (info("steps", 8, dtype="I64"), True),
    ],
)
def test_what_is_no_weight(tensor: TensorInfo, idle: bool) -> None:
    assert facts().idle(tensor) == idle


def test_an_alias_has_the_values_of_its_target() -> None:
    assert facts().tied_to("lm_head.weight", NAMES) == "model.embed_tokens.weight"
    assert facts().tied_to("lm_head.weight", ["lm_head.weight", "embed_tokens.weight"]) == "embed_tokens.weight"
    assert facts().tied_to("lm_head.weight", ["model.norm.weight"]) is None
    assert facts().tied_to("model.norm.weight", NAMES) is None
    assert facts(tie_word_embeddings=False).tied_to("lm_head.weight", NAMES) is None


def test_an_architecture_is_believed_where_it_knows_most_of_the_file() -> None:
    strange = [f"other.{number}" for number in range(4)]
    assert facts([*NAMES, *strange[:3]]).tied_to("lm_head.weight", NAMES) == "model.embed_tokens.weight"
    assert facts([*NAMES, *strange]).tied_to("lm_head.weight", NAMES) is None
    assert facts(architectures=None).tied_to("lm_head.weight", NAMES) is None
