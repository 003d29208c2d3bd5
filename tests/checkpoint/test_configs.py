"""What configs say differently about the same numbers. The oracle of the sweep is transformers: a key counts where
changing it alone changes a model's output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_model

import mergebench
from mergebench.checkpoint import configs
from mergebench.errors import ModelError

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0, "rope_scaling": None, "sliding_window": 4096,
    "use_sliding_window": False, "tie_word_embeddings": False,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0}

SAID = [
    ({"rope_theta": 1000000.0}, ["rope_theta 1000000.0 (10000.0 in a)"]),
    ({"rope_theta": None, "rope_parameters": {**PLAIN, "rope_theta": 5e5}}, ["rope_theta 500000.0 (10000.0 in a)"]),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_scaling.rope_type yarn (none in a)", "factor 4.0"]),
    ({"rope_parameters": {**PLAIN, **YARN}}, ["rope_scaling.rope_type yarn (none in a)", "rope_scaling.factor 4.0"]),
    ({"rms_norm_eps": 1e-5, "hidden_act": "gelu"}, ["rms_norm_eps 1e-05 (1e-06 in a)", "hidden_act gelu (silu in a)"]),
    ({"model_type": "mistral"}, ["model_type mistral (llama in a)"]),
    ({"use_sliding_window": True}, ["use_sliding_window true (false in a)"]),
    ({"tie_word_embeddings": True}, ["tie_word_embeddings true (false in a)"]),
]
UNSAID = [
    {"rope_scaling": {"rope_type": "default"}},
    {"rope_parameters": PLAIN},
    {"hidden_act": "swish", "sliding_window": 131072, "head_dim": 2},
    {"torch_dtype": "float16", "dtype": "bfloat16", "use_cache": False, "_name_or_path": "x", "pad_token_id": 7},
    {"transformers_version": "4", "architectures": ["X"], "attention_dropout": 0.1, "max_position_embeddings": 9},
    {"rope_parameters": "damaged", "rope_scaling": [1]},
    {"id2label": {"0": "a"}, "initializer_range": 0.1, "attention_bias": True, "quantization_config": {"bits": 4}},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    for name in "ab":
        write_model(tmp_path / name, {one: torch.randn(8, 8) for one in names}, config=CONFIG)
    return tmp_path


def change(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "b" / "config.json").write_text(json.dumps(CONFIG | changes))


def planned(**more: Any) -> mergebench.Plan:
    data = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 0.5}}
    return mergebench.plan(mergebench.load(data | more))


@pytest.mark.parametrize(("changes", "said"), SAID)
def test_what_changes_the_meaning_of_numbers_is_said(folder: Path, changes: dict[str, Any], said: list[str]) -> None:
    change(folder, changes)
    (note,) = planned().merge.notes
    assert note.startswith("b: its config.json gives the numbers another meaning: ")
    assert all(text in note for text in said)
    assert note.count(" in a)") == len(said)


@pytest.mark.parametrize("changes", UNSAID)
def test_what_does_not_is_not(folder: Path, changes: dict[str, Any]) -> None:
    change(folder, changes)
    assert planned().merge.notes == ()


def test_a_rope_base_that_an_old_config_leaves_out(folder: Path) -> None:
    (folder / "a" / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "rope_theta"}))
    assert planned().merge.notes == ()
    change(folder, {"rope_theta": 1e6})
    assert "rope_theta 1000000.0 (10000.0 in a)" in planned().merge.notes[0]


def test_the_card_and_the_provenance_say_it(folder: Path) -> None:
    change(folder, {"rope_theta": 1e6})
    result = mergebench.run(planned(), "out")
    assert "rope_theta 1000000.0" in result.provenance["notes"][0]
    assert r"rope\_theta 1000000.0" in (folder / "out" / "README.md").read_text()


@pytest.mark.parametrize("changes", [{"num_attention_heads": 2}, {"num_key_value_heads": 2}, {"head_dim": 4}])
def test_other_heads_over_the_same_matrices_are_refused(folder: Path, changes: dict[str, Any]) -> None:
    change(folder, changes)
    with pytest.raises(ModelError, match=f"b cuts the same matrices into other heads than a: .*{next(iter(changes))}"):
        planned()
    assert len(planned(exclude=["*attn*"]).alignment.merged) == 2  # the way out


def test_parts_of_models_of_other_types_are_compared(folder: Path) -> None:
    """Their language models, not what stands around them."""
    for name, heads in (("a", 4), ("b", 2)):
        part = {**CONFIG, "model_type": f"text_{name}", "num_attention_heads": heads}
        config = {"model_type": f"vision_{name}", "text_config": part, "num_attention_heads": 4}
        (folder / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"same matrices into other heads .*: num_attention_heads 2 against 4"):
        planned()


def test_a_task_vectors_config_says_nothing_of_its_numbers(folder: Path) -> None:
    mergebench.task_vector("b", "a", folder / "vector")
    changes = {"hidden_act": "relu", "num_attention_heads": 2}
    (folder / "vector" / "config.json").write_text(json.dumps(CONFIG | changes))
    assert planned(merge_method="task_arithmetic", base_model="a", models=[{"task_vector": "vector"}]).merge.notes == ()


def test_slices_compare_every_model_with_the_first(folder: Path) -> None:
    change(folder, {"rope_theta": 1e6})
    slices = [{"sources": [{"model": name, "layer_range": [0, 1]}]} for name in "ab"]
    data = {"merge_method": "passthrough", "slices": slices}
    notes = mergebench.plan(mergebench.load(data)).merge.notes
    assert "rope_theta 1000000.0 (10000.0 in a)" in notes[0]


TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "n_embd": 32,
    "intermediate_size": 48,
    "n_inner": 48,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "pad_token_id": 0,
    "sliding_window": 4,
    "rotary_dim": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


KINDS = [
    *("llama", "mistral", "gemma2", "gemma3_text", "cohere2", "granite", "granitemoe", "mixtral", "qwen2_moe", "olmoe"),
    *("gpt2", "gptj", "gpt_neox", "bloom", "falcon", "phi", "phi3", "stablelm", "glm4", "smollm3", "gpt_oss", "bert"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_key_that_changes_an_output_is_said(kind: str) -> None:
    import transformers

    made = transformers.CONFIG_MAPPING[kind]()
    for key, value in made.to_dict().items():
        if key in TINY:
            setattr(made, key, TINY[key])
        elif key in ("layer_types", "no_rope_layers") and value:
            setattr(made, key, value[:2])
    written = json.loads(made.to_json_string())
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def run(config: dict[str, Any], state: dict[str, torch.Tensor] | None) -> tuple[dict[str, torch.Tensor], Any]:
        model = getattr(transformers, names[kind])(type(made).from_dict(dict(config))).eval()
        model.load_state_dict(state or model.state_dict())
        with torch.no_grad():
            return model.state_dict(), model(input_ids=torch.arange(4, 28)[None]).logits

    torch.manual_seed(0)
    state = {name: value + 0.3 * torch.randn(value.shape) for name, value in run(written, None)[0].items()}
    _, expected = run(written, state)
    tried = 0
    for key, value in written.items():
        activation = isinstance(value, str) and "act" in key
        if not activation and not isinstance(value, (bool, int, float)):
            continue
        other = not value if isinstance(value, bool) else "relu" if activation else value * 2 + isinstance(value, float)
        try:
            _, found = run(written | {key: other}, state)
        except Exception:  # other shapes, or no valid config
            continue
        tried += 1
        if found.shape == expected.shape and not torch.allclose(found, expected, atol=1e-5, equal_nan=True):
            heads = configs._heads(written) != configs._heads(written | {key: other})
            assert heads or key in configs._differences(written, written | {key: other}), key
    assert tried > 5
