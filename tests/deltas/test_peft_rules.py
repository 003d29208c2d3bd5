"""Rules of PEFT directories of every type, each by hand: names, heads, orientation, tensors saved whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergebench.checkpoint.format import Base, Deltas
from mergebench.checkpoint.header import TensorInfo
from mergebench.deltas.low_rank import low_rank
from mergebench.deltas.peft.directory import whole_name
from mergebench.deltas.peft.heads import Head, new_head, with_head
from mergebench.deltas.peft.names import Names, Placing, put_whole
from mergebench.deltas.peft.orientation import Orientation
from mergebench.errors import ModelError

PLACE = Path("lora")


def infos(shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, dtype, shape, Path("x"), 0, 0) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("stored", "settings", "name"),
    [
        ("layer.bias", {"bias": "all"}, "layer.bias"),
        ("layer.base_layer.bias", {"bias": "lora_only"}, "layer.bias"),
        ("layer.bias", {"bias": "none"}, None),
        ("layer.bias", {}, None),
        ("head.weight", {"modules_to_save": ["head"]}, "head.weight"),
        ("head.weight", {}, None),
        ("model.embed_tokens.weight", {}, "model.embed_tokens.weight"),  # PEFT saves a resized one unlisted
        ("head.lora_C.weight", {"modules_to_save": ["head"]}, None),
        ("head.base_layer.weight", {"modules_to_save": ["head"]}, None),
    ],
)
def test_what_is_saved_whole(stored: str, settings: dict[str, Any], name: str | None) -> None:
    if name is not None:
        assert whole_name(PLACE, stored, stored, settings) == name
        return
    with pytest.raises(ModelError, match="not known in an adapter of this type"):
        whole_name(PLACE, stored, stored, settings)


def test_a_longer_or_shorter_name_must_be_the_only_one() -> None:
    names = Names(PLACE, infos(dict.fromkeys(["model.x.weight", "a.y.weight", "b.y.weight", "z.weight"], (2, 2))), {})
    assert [names.find(name) for name in ("x.weight", "model.x.weight", "c.z.weight")] == [
        "model.x.weight", "model.x.weight", "z.weight",
    ]  # fmt: skip
    with pytest.raises(ModelError, match=r"no tensor 'y\.weight' to adapt"):
        names.find("y.weight")


def placing(shapes: dict[str, tuple[int, ...]], dtype: str = "F32", **base: tuple[int, ...]) -> Placing:
    tensors = infos({name.replace("__", "."): shape for name, shape in base.items()}, dtype)
    return Placing(PLACE, Base("base", tensors, {}), dict(shapes))


@pytest.mark.parametrize(
    ("stored", "shape", "says"),
    [
        ("head.weight", (3, 4), r"the adapter changes \[3, 4\], base has \[5, 4\]"),
        ("lm_head.weight", (3, 4), "it has 3 tokens, the base 5"),
        ("lm_head.weight", (3, 6), r"the adapter changes \[3, 6\], base has \[5, 4\]"),
    ],
)
def test_another_shape_is_refused(stored: str, shape: tuple[int, ...], says: str) -> None:
    whole = infos({stored: shape})
    with pytest.raises(ModelError, match=says):
        placing({stored: shape}, head__weight=(5, 4), lm_head__weight=(5, 4)).put_whole(whole)


def test_integers_are_not_adapted() -> None:
    with pytest.raises(ModelError, match="base has it as I32: only floats can be adapted"):
        placing({"a.weight": (2, 2)}, "I32", a__weight=(2, 2)).put_whole(infos({"a.weight": (2, 2)}))


def test_only_a_bias_is_saved_whole_and_changed() -> None:
    shapes = {"a.weight": (2, 2), "a.bias": (2, 2)}
    factors = infos({"b": (2, 1), "a": (1, 2)})
    for name in shapes:
        above, below = (placing(dict(shapes), a__weight=(2, 2), a__bias=(2, 2)) for _ in range(2))
        above.put_on(name, name, low_rank, factors)
        if name == "a.bias":
            assert put_whole(infos({name: (2, 2)}), above, below) == {} and below.deltas.keys() == {name}
            continue
        with pytest.raises(ModelError, match=r"'a\.weight' is changed twice"):
            put_whole(infos({name: (2, 2)}), above, below)


CONV1D = {"h.c_attn.weight": (4, 12), "h.c_attn.bias": (12,)}  # [in, out]
LINEAR = {"h.fc.weight": (12, 4), "h.fc.bias": (12,)}
TALL = {"x.c_proj.weight": (12, 4), "x.c_proj.bias": (12,)}


def square(name: str) -> dict[str, tuple[int, ...]]:
    return {f"h.{name}.weight": (4, 4), f"h.{name}.bias": (4,)}


@pytest.mark.parametrize(
    ("shapes", "weight", "of_transformers", "said", "in_out"),
    [
        (CONV1D, "h.c_attn.weight", True, False, True),
        (LINEAR, "h.fc.weight", True, True, False),
        (CONV1D | square("c_proj"), "h.c_proj.weight", True, False, True),  # as all the others
        (CONV1D | TALL | square("c_proj"), "h.c_proj.weight", True, True, False),  # as the one of its name
        (CONV1D | LINEAR | square("c_proj"), "h.c_proj.weight", True, True, True),  # they differ: what the config says
        (CONV1D | LINEAR | square("c_proj"), "h.c_proj.weight", True, False, False),
        (square("c_proj"), "h.c_proj.weight", True, True, True),
        ({"h.q.weight": (4, 4)}, "h.q.weight", True, True, False),  # without a bias it is no Conv1D
        ({"h.q.weight": (4, 4)}, "h.q.weight", False, True, True),
        ({"h.q.weight": (4, 4)} | CONV1D, "h.q.weight", False, True, False),
        ({"h.conv.weight": (4, 3, 2), "h.conv.bias": (4,)}, "h.conv.weight", True, True, False),
    ],
)  # fmt: skip
def test_which_way_round_a_weight_is(
    shapes: dict[str, tuple[int, ...]], weight: str, of_transformers: bool, said: bool, in_out: bool
) -> None:
    base = Base("base", infos(shapes), {"model_type": "gpt2"} if of_transformers else {})
    assert Orientation(base, said).in_out(weight) == in_out


def test_a_new_head_takes_the_place_of_the_old_one() -> None:
    """Its model's buffers and integers stay; a delta on the old head goes with it."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4, "intermediate_size": 4,
        "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 6, "tie_word_embeddings": False,
    }  # fmt: skip
    words = [*(f"self_attn.{one}" for one in "qkvo"), *(f"mlp.{one}" for one in ("gate", "up", "down"))]
    layer: dict[str, tuple[int, ...]] = dict.fromkeys([f"{one}_proj" for one in words], (4, 4))
    layer |= {"input_layernorm": (4,), "post_attention_layernorm": (4,)}
    shapes: dict[str, tuple[int, ...]] = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (6, 4), "model.norm.weight": (4,), "lm_head.weight": (6, 4)}
    shapes |= {"model.rotary_emb.inv_freq": (1,)}
    base = Base("base", infos(shapes) | infos({"steps": (2,)}, "I64"), config)
    head = new_head(PLACE, infos({"score.weight": (3, 4)}), {"task_type": "SEQ_CLS"}, base)
    assert (set(head.added), head.removed) == ({"score.weight"}, {"lm_head.weight"})
    assert head.config["architectures"] == ["LlamaForSequenceClassification"] and len(head.config["id2label"]) == 3
    for wrong in ({"score.weight": (3, 4), "other.weight": (3, 4)}, {"score.weight": (3, 5)}):
        with pytest.raises(ModelError, match="it brings a part"):
            new_head(PLACE, infos(wrong), {"task_type": "SEQ_CLS"}, base)
    changes = {
        name: low_rank.on((6, 4), infos({"b": (6, 1), "a": (1, 4)}))
        for name in ("lm_head.weight", "model.embed_tokens.weight")
    }
    assert with_head(Deltas(changes, []), head).deltas.keys() == {"model.embed_tokens.weight"}
    assert with_head(Deltas(changes, []), Head({}, frozenset(), {})).deltas == changes
