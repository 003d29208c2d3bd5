"""Models of one architecture in files of other names and layouts: the merge is that of files that agree.

Each architecture is saved by transformers in its files' layout and in memory's (`save_original_format=False`):
a model in the one must merge into a base in the other, bit for bit as if both were alike, and load.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import fine_tuned, read_model, write_model, write_recipe
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    LlamaConfig,
)

import mergebench
from mergebench.errors import MergebenchError
from tests.conftest import Cli

TEXT = {
    "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "head_dim": 8}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
TOWER = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}

MADE: dict[str, tuple[Any, Callable[[], Any]]] = {
    "llava": (
        AutoModelForImageTextToText,
        lambda: transformers.LlavaConfig(
            text_config=LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**VISION), image_token_index=47
        ),
    ),
    "qwen2-vl": (
        AutoModelForImageTextToText,
        lambda: transformers.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=TOWER),
    ),
    "gemma3": (
        AutoModelForImageTextToText,
        lambda: transformers.Gemma3Config(
            text_config={**TEXT, "head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4
        ),
    ),
    "vit": (AutoModelForImageClassification, lambda: transformers.ViTConfig(**VISION)),
    "mixtral": (AutoModelForCausalLM, lambda: transformers.MixtralConfig(**TEXT, num_local_experts=4)),
    "qwen3-moe": (AutoModelForCausalLM, lambda: transformers.Qwen3MoeConfig(**TEXT, **EXPERTS)),
    "llama": (AutoModelForCausalLM, lambda: LlamaConfig(**TEXT)),
}
BOTH = [name for name in MADE if name != "llama"]
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ties": {"parameters": {"density": 0.3}},
    "dare_ties": {"parameters": {"density": 0.5}},
}


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory with base, ft1 and ft2, each as `files` and as `memory`, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = folder = tmp_path_factory.mktemp(name)
            auto, config = MADE[name]
            torch.manual_seed(0)
            model = auto.from_config(config())
            for number, which in enumerate(("base", "ft1", "ft2")):
                with torch.no_grad():
                    for value in model.parameters() if number else ():
                        value.add_(0.02 * torch.randn_like(value))
                model.save_pretrained(folder / which / "files")
                model.save_pretrained(folder / which / "memory", save_original_format=False)
        return made[name]

    return get


def merge(out: Path, method: str, base: Path, *models: Path, chunk: int | None = None, **recipe: Any) -> Any:
    data = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
        **METHODS.get(method, {}),
        **recipe,
    }
    plan = mergebench.plan(mergebench.load(data), device="cpu", workers=2, chunk=chunk)
    mergebench.run(plan, out)
    return plan


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def load(auto: Any, place: Path) -> Any:
    model, info = auto.from_pretrained(place, output_loading_info=True)
    assert {key: sorted(value) for key, value in info.items() if value} == {}
    return model


@pytest.mark.parametrize("base", ["files", "memory"])
@pytest.mark.parametrize("name", BOTH)
def test_either_layout_is_read_as_the_bases(zoo: Any, tmp_path: Path, name: str, base: str) -> None:
    folder, other = zoo(name), {"files": "memory", "memory": "files"}[base]
    assert read_model(folder / "ft2" / base).keys() != read_model(folder / "ft2" / other).keys()
    same = [folder / which / base for which in ("base", "ft1", "ft2")]
    for method in METHODS:
        merge(tmp_path / f"{method}-same", method, *same)
        plan = merge(tmp_path / method, method, *same[:2], folder / "ft2" / other)
        equal(read_model(tmp_path / method), read_model(tmp_path / f"{method}-same"))
        assert plan.merge.models[-1].remarks and not plan.merge.models[0].remarks
    model = load(MADE[name][0], tmp_path / "linear").state_dict()
    models = [load(MADE[name][0], folder / which / "files").state_dict() for which in ("ft1", "ft2")]
    for key, value in model.items():
        torch.testing.assert_close(value, sum(one[key] for one in models) / 2, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_experts_are_cut_anywhere(zoo: Any, tmp_path: Path, chunk: int) -> None:
    """A chunk's borders fall within experts and across them."""
    folder = zoo("qwen3-moe")
    ways = [folder / "base" / "memory", folder / "ft1" / "files"]
    merge(tmp_path / "cut", "ties", *ways, chunk=chunk)
    merge(tmp_path / "same", "ties", ways[0], folder / "ft1" / "memory")
    equal(read_model(tmp_path / "cut"), read_model(tmp_path / "same"))


HISTORY: dict[str, tuple[dict[str, Tensor], Callable[[str], str], str]] = {
    "CLIP's vision tower": (
        {"vision_model.embeddings.class_embedding": torch.randn(8), "vision_model.post_layernorm.bias": torch.randn(8)},
        lambda name: name.removeprefix("vision_model."),
        "2 tensors read under other names (* as vision_model.*)",
    ),
    "a class without its prefix": (
        {"bert.encoder.layer.0.output.dense.weight": torch.randn(4, 4), "bert.pooler.dense.bias": torch.randn(4)},
        lambda name: name.removeprefix("bert."),
        "2 tensors read under other names (* as bert.*)",
    ),
    "gamma and beta": (
        {"bert.LayerNorm.weight": torch.randn(4), "bert.LayerNorm.bias": torch.randn(4)},
        lambda name: name.replace("weight", "gamma").replace("bias", "beta"),
        "2 tensors read under other names (*.beta as *.bias, *.gamma as *.weight)",
    ),
    "gamma and beta, no prefix": (
        {"bert.LayerNorm.weight": torch.randn(4), "bert.dense.bias": torch.randn(4)},
        lambda name: name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma"),
        "2 tensors read under other names (*.gamma as *.weight, * as bert.*)",
    ),
    "weight norm": (
        {"conv.parametrizations.weight.original0": torch.randn(1, 4), "conv.bias": torch.randn(4)},
        lambda name: name.replace("parametrizations.weight.original0", "weight_g"),
        "1 tensor read under other names (*.weight_g as *.original0)",
    ),
    "LLaVA of the hub": (
        {"vision_tower.encoder.layers.0.mlp.fc1.bias": torch.randn(4), "projector.bias": torch.ones(4)},
        lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
        "1 tensor read under other names (vision_tower.vision_model.* as vision_tower.*)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HISTORY)
def test_names_that_changed(tmp_path: Path, case: str) -> None:
    """The result has the base's names, whichever of the two is the older."""
    tensors, change, remark = HISTORY[case]
    tuned = fine_tuned(tensors, 1)
    for version, names in {"newer": str, "older": change}.items():
        for which, values in {"base": tensors, "ft": tuned}.items():
            write_model(tmp_path / version / which, {names(name): value for name, value in values.items()})
    for ours, theirs, names in (("newer", "older", str), ("older", "newer", change)):
        plan = merge(tmp_path / ours / "out", "linear", tmp_path / ours / "base", tmp_path / theirs / "ft")
        equal(read_model(tmp_path / ours / "out"), {names(name): value for name, value in tuned.items()})
        assert ours == "older" or plan.merge.models[0].remarks == (remark,)


def test_two_towers_that_differ_in_depth(tmp_path: Path) -> None:
    """Only one of them has all of the model's layers: that one is meant, though the other's fit too."""
    layers = {f"h.{n}.weight": torch.randn(4, 4) for n in range(3)}
    base = {f"vision_model.{name}": value for name, value in layers.items()}
    base |= {f"text_model.{name}": value + 1 for name, value in list(layers.items())[:2]}
    tuned = fine_tuned(layers, 1)
    merge(
        tmp_path / "out", "linear", write_model(tmp_path / "base", base), write_model(tmp_path / "tower", tuned),
        include=["vision_model.*"],
    )  # fmt: skip
    merged = read_model(tmp_path / "out")
    equal(merged, base | {f"vision_model.{name}": value for name, value in tuned.items()})


@pytest.mark.parametrize("base", ["files", "memory"])
def test_a_text_model_merges_into_a_vision_language_model(zoo: Any, tmp_path: Path, base: str) -> None:
    """The language part is merged, the tower and the projector stay as they are, the result loads and answers."""
    part = {"files": "language_model.*", "memory": "model.language_model.*"}[base]
    place, text = zoo("llava") / "base" / base, zoo("llama") / "ft1" / "files"
    recipe = {"include": [part, "lm_head.*"]}
    plan = merge(tmp_path / "out", "linear", place, place, text, **recipe)
    before, merged = read_model(place), read_model(tmp_path / "out")
    assert len(plan.alignment.merged) == len(read_model(text)) == 21
    for name, value in merged.items():
        if "language_model" not in name and "lm_head" not in name:
            assert torch.equal(value, before[name])
    model = load(AutoModelForImageTextToText, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(text).state_dict()
    first = load(AutoModelForImageTextToText, place).state_dict()
    for key, value in model.state_dict().items():
        name = key.replace("model.language_model.", "model.")
        expected = (first[key] + theirs[name]) / 2 if name in theirs and "vision" not in key else first[key]
        torch.testing.assert_close(value, expected)


def test_plan_merge_and_explain_say_what_was_read_as_what(zoo: Any, tmp_path: Path, cli: Cli) -> None:
    folder = zoo("mixtral")
    recipe = write_recipe(tmp_path / "r.yaml", "linear", [folder / "ft2" / "memory"], folder / "base" / "files")
    remarks = [
        "memory: experts stored fused, read apart (w1, w3, w2)",
        "memory: 26 tensors read under other names (model.layers.N.mlp.* as model.layers.N.block_sparse_moe.*)",
    ]
    for command in (["plan", recipe], ["explain", recipe], ["merge", recipe, "--out", tmp_path / "out"]):
        said = cli(*command).err.splitlines()
        assert [line for line in said if line.startswith("note: ")] == [f"note: {one}" for one in remarks]
    assert json.loads(cli("plan", recipe, "--json").out)["notes"] == remarks
    assert json.loads((tmp_path / "out" / "mergebench.json").read_text())["notes"] == remarks
    told = {line.split()[0]: line for line in cli("explain", recipe).out.splitlines()}
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    assert told[name].endswith("from memory:model.layers.1.mlp.experts.gate_up_proj")
    assert "from" not in told["model.norm.weight"]


def test_without_include_the_way_out_is_told(zoo: Any, tmp_path: Path) -> None:
    place, text = zoo("llava") / "base" / "files", zoo("llama") / "ft1" / "files"
    with pytest.raises(MergebenchError) as error:
        merge(tmp_path / "out", "linear", place, text)
    assert error.value.hint == 'to merge only what all have: exclude: ["multi_modal_projector.*", "vision_tower.*"]'
    plan = merge(tmp_path / "out", "linear", place, text, exclude=["multi_modal_projector.*", "vision_tower.*"])
    assert len(plan.alignment.merged) == 21


def test_layers_that_the_config_does_not_count_are_named_to_be_excluded(tmp_path: Path) -> None:
    """DeepSeek and GLM keep the layer that predicts several tokens after the last."""
    base = {f"model.layers.{layer}.mlp.up_proj.weight": torch.ones(4, 4) for layer in range(2)}
    more = {f"model.layers.2.{name}.weight": torch.ones(4) for name in ("enorm", "hnorm", "mlp.up_proj")}
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 2}
    one = write_model(tmp_path / "one", base, config=config)
    two = write_model(tmp_path / "two", base | more, config=config)
    with pytest.raises(MergebenchError) as error:
        merge(tmp_path / "out", "linear", one, two)
    assert error.value.hint == 'to merge only what all have: exclude: ["model.layers.2.*"]'
    assert len(merge(tmp_path / "out", "linear", one, two, exclude=["model.layers.2.*"]).alignment.merged) == 2


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: "_fsdp_wrapped_module." + name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
        lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp._orig_mod."),
    ],
)
def test_wrappers_of_training_are_no_part_of_a_name(wrapped: Callable[[str], str], tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(2) for part in ("mlp.up_proj", "norm")]
    base = {name: torch.full((4, 4), float(number)) for number, name in enumerate(names)}
    tuned = fine_tuned(base, 1)
    one = write_model(tmp_path / "one", base)
    two = write_model(tmp_path / "two", {wrapped(name): value for name, value in tuned.items()})
    merge(tmp_path / "out", "linear", one, two)
    assert read_model(tmp_path / "out").keys() == base.keys()
    for name, value in read_model(tmp_path / "out").items():
        torch.testing.assert_close(value, tuned[name])
    merge(tmp_path / "same", "linear", two, two)  # a base's own names are kept
    assert read_model(tmp_path / "same").keys() == {wrapped(name) for name in names}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_an_adapter_trained_under_other_names(zoo: Any, tmp_path: Path) -> None:
    """PEFT names modules as transformers has them in memory; the files have other names."""
    place = zoo("llava") / "base" / "files"
    model = AutoModelForImageTextToText.from_pretrained(place)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "lora")
    folded = tuned.merge_and_unload()
    merge(tmp_path / "out", "linear", place, Path(f"{place}+{tmp_path / 'lora'}"))
    result = load(AutoModelForImageTextToText, tmp_path / "out").state_dict()
    changed = 0
    for key, value in folded.state_dict().items():
        torch.testing.assert_close(result[key], value, rtol=1e-5, atol=1e-6)
        changed += not torch.equal(value, load(AutoModelForImageTextToText, place).state_dict()[key])
    assert changed == 2


def test_fp8_experts_into_a_fused_base(tmp_path: Path) -> None:
    """Experts apart with a scale a row, base fused in bfloat16: the values are those they stand for."""
    base, tuned, values = {}, {}, []
    for number in range(3):
        for word, shape in (("gate_proj", (4, 6)), ("up_proj", (4, 6)), ("down_proj", (6, 4))):
            name = f"mlp.experts.{number}.{word}.weight"
            tuned[name] = torch.randn(shape).to(torch.float8_e4m3fn)
            tuned[f"{name}_scale"] = torch.rand(shape[0], 1) + 0.5
            values.append(tuned[name].float() * tuned[f"{name}_scale"])
    base["mlp.experts.gate_up_proj"] = torch.zeros(3, 8, 6, dtype=torch.bfloat16)
    base["mlp.experts.down_proj"] = torch.zeros(3, 6, 4, dtype=torch.bfloat16)
    write_model(tmp_path / "fp8", tuned)
    merge(tmp_path / "out", "linear", write_model(tmp_path / "base", base), tmp_path / "fp8", dtype="float32", chunk=5)
    merged = read_model(tmp_path / "out")
    both = torch.stack([torch.cat([values[3 * n], values[3 * n + 1]]) for n in range(3)])
    assert torch.equal(merged["mlp.experts.gate_up_proj"], both)
    assert torch.equal(merged["mlp.experts.down_proj"], torch.stack(values[2::3]))


def experts(fused: bool, **change: Any) -> dict[str, Tensor]:
    if fused:
        return {"mlp.experts.gate_up_proj": torch.ones(2, 8, 6), "mlp.experts.down_proj": torch.ones(2, 6, 4)} | change
    words = {"gate_proj": (4, 6), "up_proj": (4, 6), "down_proj": (6, 4)}
    found = {f"mlp.experts.{n}.{word}.weight": torch.ones(shape) for n in range(2) for word, shape in words.items()}
    return {name: value for name, value in (found | change).items() if value is not None}


@pytest.mark.parametrize(
    ("base", "model", "says"),
    [
        (experts(False), experts(True, **{"mlp.experts.gate_up_proj_bias": torch.ones(2, 8)}), "one by one"),
        (
            experts(False),
            {"mlp.experts.gate_up_proj": torch.ones(2, 6, 8), "mlp.experts.down_proj": torch.ones(2, 4, 6)},
            "[2, 6, 8], down_proj [2, 4, 6]: not [experts, 2 x inner, outer]",
        ),
        (experts(True), experts(False, **{"mlp.experts.0.up_proj.weight": None}), "no up_proj or w3 of expert 0, of 2"),
        (experts(True), experts(False, **{"mlp.experts.1.up_proj.weight": torch.ones(6, 4)}), "expert 1 cannot be"),
    ],
    ids=["biases", "transposed", "missing", "another shape"],
)  # fmt: skip
def test_layouts_that_cannot_be_read(tmp_path: Path, base: Any, model: Any, says: str) -> None:
    write_model(tmp_path / "base", base | {"norm": torch.ones(2)})
    write_model(tmp_path / "ft", model | {"norm": torch.zeros(2)})
    with pytest.raises(MergebenchError) as error:
        merge(tmp_path / "out", "linear", tmp_path / "base", tmp_path / "ft")
    assert says in error.value.message
    merge(tmp_path / "out", "linear", tmp_path / "base", tmp_path / "ft", exclude=["*.experts.*"])
    assert torch.equal(read_model(tmp_path / "out")["norm"], torch.zeros(2))
