"""What a config says of single layers, and says of the same layers in other places: values by hand."""

from __future__ import annotations

from typing import Any

import pytest

from mergebench.errors import ModelError
from mergebench.recipe.layers import Layer, follow, kind_of, unlike

ALIKE = frozenset({"w"})


def layers(reference: str, config: dict[str, Any], names: list[frozenset[str]] | None = None) -> list[Layer]:
    """All layers of a model, by default of the same tensors."""
    return [Layer(reference, config, at, names[at] if names else ALIKE) for at in range(4)]


def changes(chosen: list[int], first: list[Layer], second: list[Layer] | None = None) -> dict[str, Any]:
    """The changes for these layers; numbers from 4 on are the second model's."""
    known = first + (second or [])
    return follow([known[at] for at in chosen], known)


FOUR: dict[str, Any] = {"model_type": "x", "num_hidden_layers": 4}
SAID = [
    (FOUR, {}, []),
    (FOUR, {"layer_types": ["a", "b", "c", "d"]}, ["a", "b", "c", "d"]),
    (FOUR, {"layer_types": ["a", "b"]}, []),  # not a list of layers
    (FOUR, {"eos_token_id": [1, 2, 3, 4]}, []),
    (FOUR, {"hybrid_override_pattern": "M-M*"}, ["M", "-", "M", "*"]),
    (FOUR, {"tokenizer_name": "abcd"}, []),
    (FOUR, {"block_types": ["r", "a"]}, ["r", "a", "r", "a"]),
    (FOUR, {"attention_types": [[["g", "l"], 2]]}, ["g", "l", "g", "l"]),
    (FOUR, {"mlp_only_layers": [0, 3]}, [True, False, False, True]),
    (FOUR, {"first_k_dense_replace": 1}, [True, False, False, False]),
    (FOUR, {"moe_layer_end_index": 1}, [True, True, False, False]),
    (FOUR, {"max_window_layers": 1}, []),
    (FOUR | {"use_sliding_window": True}, {"max_window_layers": 1}, [True, False, False, False]),
    (FOUR, {"num_kv_shared_layers": 1}, [False, False, False, True]),
    (FOUR, {"decoder_sparse_step": 2}, [False, True, False, True]),
    (FOUR, {"global_attn_every_n_layers": 3}, [True, False, False, True]),
    (FOUR | {"attn_layer_offset": 1}, {"attn_layer_period": 3}, [False, True, False, False]),
    (FOUR, {"decoder_sparse_step": 0}, []),
    (FOUR, {"first_k_dense_replace": True}, []),
    (FOUR | {"model_type": "gemma2"}, {}, [False, True, False, True]),
    (FOUR | {"model_type": "gemma2"}, {"layer_types": ["a", "b", "c", "d"]}, ["a", "b", "c", "d"]),
    ({"text_config": FOUR | {"mlp_only_layers": [2]}}, {}, [False, False, True, False]),
    (FOUR | {"text_config": FOUR | {"mlp_only_layers": [2]}}, {}, []),  # the count is the model's own
    # a damaged config says nothing
    (FOUR, {"attention_types": [["g", "l"]]}, []),
    (FOUR, {"attention_types": [[["g"], 10**12]]}, ["g", "g", "g", "g"]),
    (FOUR | {"attn_layer_offset": None}, {"attn_layer_period": 2}, [True, False, True, False]),
    (FOUR | {"num_hidden_layers": 10**30}, {"mlp_only_layers": [2]}, []),
    (FOUR | {"num_hidden_layers": True}, {"mlp_only_layers": [0]}, []),
]


@pytest.mark.parametrize(("config", "more", "kinds"), SAID)
def test_what_a_config_says_of_each_layer(config: dict[str, Any], more: dict[str, Any], kinds: list[Any]) -> None:
    said = [list(kind_of(layer).values()) for layer in layers("a", config | more)]
    assert said == ([[kind] for kind in kinds] if kinds else [[]] * 4)


FOLLOWED = [
    ({}, [0, 1, 2, 3], {}),
    ({"num_mem_blocks": 2}, [0, 1, 2, 3], {}),  # the model whole: nothing to describe anew
    ({}, [0, 1], {"num_hidden_layers": 2}),
    ({"n_layer": 4, "depth": 9}, [0, 1], {"num_hidden_layers": 2, "n_layer": 2}),
    ({"layer_types": ["a", "b", "c", "d"]}, [3, 1], {"num_hidden_layers": 2, "layer_types": ["d", "b"]}),
    ({"hybrid_override_pattern": "M-M*"}, [3, 0, 1], {"num_hidden_layers": 3, "hybrid_override_pattern": "*M-"}),
    (
        {"attention_types": [[["g", "l"], 2]]}, [1, 1, 2],
        {"num_hidden_layers": 3, "attention_types": [[["l", "l", "g"], 1]]},
    ),
    ({"mlp_only_layers": [0, 3]}, [3, 3, 1, 0], {"num_hidden_layers": 4, "mlp_only_layers": [0, 1, 3]}),
    ({"first_k_dense_replace": 1}, [0, 0, 1], {"num_hidden_layers": 3, "first_k_dense_replace": 2}),
    ({"first_k_dense_replace": 4}, [0, 1, 2, 3, 3], {"num_hidden_layers": 5, "first_k_dense_replace": 5}),
    ({"first_k_dense_replace": 9}, [0, 1], {"num_hidden_layers": 2, "first_k_dense_replace": 9}),
    ({"moe_layer_end_index": 1}, [0, 2], {"num_hidden_layers": 2, "moe_layer_end_index": 0}),
    ({"num_kv_shared_layers": 1}, [0, 1, 3, 3], {"num_hidden_layers": 4, "num_kv_shared_layers": 2}),
    ({"num_kv_shared_layers": 0}, [0, 1, 3], {"num_hidden_layers": 3, "num_kv_shared_layers": 0}),
    ({"decoder_sparse_step": 2}, [2, 3], {"num_hidden_layers": 2, "decoder_sparse_step": 2}),
    (  # the list holds, and the rule beside it says nothing
        {"layer_types": ["s", "s", "s", "f"], "sliding_window_pattern": 4}, [0, 3],
        {"num_hidden_layers": 2, "layer_types": ["s", "f"], "sliding_window_pattern": 4},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("more", "chosen", "expected"), FOLLOWED)
def test_what_it_says_of_them_in_other_places(
    more: dict[str, Any], chosen: list[int], expected: dict[str, Any]
) -> None:
    assert changes(chosen, layers("a", FOUR | more)) == expected


def test_of_a_part_of_the_config() -> None:
    assert changes([0], layers("a", {"text_config": FOUR})) == {"text_config": FOUR | {"num_hidden_layers": 1}}


def test_a_layers_own_config_holds_and_the_first_models_for_what_it_leaves_out() -> None:
    first, other, silent = ({"layer_types": list(types)} for types in ("abcd", "dcba", ""))
    assert changes([0, 5], layers("a", FOUR | first), layers("b", FOUR | other))["layer_types"] == ["a", "c"]
    assert changes([0, 5], layers("a", FOUR | first), layers("b", FOUR | silent))["layer_types"] == ["a", "b"]


def test_tensors_of_kinds_that_no_config_tells() -> None:
    """They keep their places; beyond the model's own layers too where all but the first are alike."""
    late = [frozenset({"mlp"}), *[frozenset({"experts"})] * 3]
    assert changes([0, 1, 2, 3, 3], layers("a", FOUR, late)) == {"num_hidden_layers": 5}
    mixed = [frozenset({"mlp"}), frozenset({"experts"})] * 2
    assert changes([0, 3, 2, 1], layers("a", FOUR, mixed)) == {"num_hidden_layers": 4}
    for chosen in ([0, 1], [0, 1, 2, 3, 3]):
        with pytest.raises(ModelError, match=r"nothing known in config\.json says"):
            changes(chosen, layers("a", FOUR, mixed))


def test_which_layers_are_unlike() -> None:
    few, more = (layers(name, FOUR, [frozenset(names)] * 4)[1] for name, names in (("a", "x"), ("b", "xy")))
    what = "layer 1 of {} and layer 1 of {} are of different kinds: only layer 1 of b has y"
    assert (unlike(few, more), unlike(more, few)) == (what.format("a", "b"), what.format("b", "a"))
    one, other = (layers(name, FOUR | {"layer_types": list(types)}) for name, types in (("a", "fssf"), ("b", "ffss")))
    what = "layer 1 of a and layer 1 of b are of different kinds, by layer_types in config.json"
    assert unlike(one[1], other[1]) == what
    assert unlike(one[1], other[2]) is None
    assert unlike(one[1], layers("c", FOUR)[1]) is None and unlike(layers("c", FOUR)[1], one[1]) is None
