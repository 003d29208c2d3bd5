"""A patch as a part of a model: it merges, it is evaluated, it is shown, and PEFT loads it as a LoRA."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import read_model, write_model, write_recipe
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergebench
from mergebench.adapters.from_patch import patch_to_lora
from mergebench.api import plan_edit, plan_patch
from mergebench.checkpoint.header import read_header
from mergebench.deltas.open import open_model
from mergebench.editing.patches import open_patch
from mergebench.errors import ModelError
from tests.conftest import Cli
from tests.editing.conftest import CONFIG, GATE, LAYERS, WIDTH, gated, write_probe

PATCH = "patch.safetensors"
pytestmark = pytest.mark.usefixtures("one_thread")


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """To the bit."""
    return left.keys() == right.keys() and all(
        torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)) for name, tensor in left.items()
    )


def merge(out: Path, method: str, models: list[Any], base: Path | None = None, **more: Any) -> dict[str, Tensor]:
    entries = [one if isinstance(one, dict) else {"model": str(one)} for one in models]
    recipe = {"merge_method": method, "models": entries} | ({"base_model": str(base)} if base else {}) | more
    return read_model(mergebench.run(mergebench.plan(mergebench.load(recipe), device="cpu"), out).out)


def delta_of(patch: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a patch adds to each tensor, float32, by brute force."""
    read = load_file(patch)
    opened = open_patch(patch)
    columns = [name for name in opened.names if opened.columns(name)]
    found = {}
    for name, tensor in like.items():
        delta = torch.zeros(tensor.shape)
        if f"{name}.rows" in read:
            turned = delta.T if name in columns else delta
            turned[read[f"{name}.rows"]] = read[f"{name}.amount"][:, None] * read["direction"]
        found[name] = delta
    return found


@pytest.fixture
def two(model: Path, probe: Path, tmp_path: Path) -> list[Path]:
    """Patches of the model that share rows: of gates, and of what is written."""
    other = write_probe(
        tmp_path / "other.safetensors", torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(9))
    )
    mergebench.run(plan_edit(str(model), probe, rows="60%", alpha=0.7), tmp_path / "first")
    mergebench.run(plan_edit(str(model), other, rows="60%", alpha=-0.4, target="*_proj.weight"), tmp_path / "second")
    return [tmp_path / name / PATCH for name in ("first", "second")]


# -- as a model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", ["gate_proj", "down_proj", "*_proj.weight"])
def test_the_model_with_it_is_what_the_edit_wrote(dtype: torch.dtype, target: str, probe: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", gated(dtype), shards=2, config=CONFIG)
    mergebench.run(plan_edit(str(model), probe, rows="40%", alpha=0.3, target=target), tmp_path / "edited")
    patch = tmp_path / "edited" / PATCH
    edited = read_model(tmp_path / "edited")

    assert not same(read_model(model), edited)
    assert same(edited, merge(tmp_path / "copy", "passthrough", [f"{model}+{patch}"]))
    assert same(edited, merge(tmp_path / "average", "linear", [f"{model}+{patch}"] * 2))
    assert same(edited, {n: t.to(dtype) for n, t in open_model(f"{model}+{patch}").state_dict().items()})


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {"lambda": 0.5}),
        ("ties", {"density": 0.3}),
        ("dare_ties", {"density": 0.5}),
        ("pcb", {"density": 0.2}),
        ("magmax", {}),
        ("tsv_m", {}),
    ],
)
def test_patches_merge_like_any_task_vectors(
    method: str, parameters: dict[str, Any], two: list[Path], model: Path, tmp_path: Path
) -> None:
    """As with their differences laid out, in float32 and in full."""
    vectors = []
    for number, patch in enumerate(two):
        vectors.append(write_model(tmp_path / f"vector{number}", delta_of(patch, read_model(model)), config=CONFIG))
    wanted = merge(tmp_path / "a", method, [{"task_vector": str(v)} for v in vectors], model, parameters=parameters)
    found = merge(tmp_path / "b", method, [f"{model}+{patch}" for patch in two], model, parameters=parameters)

    assert same(wanted, found) and not same(found, read_model(model))


def test_task_arithmetic_of_patches_is_their_sum(two: list[Path], model: Path, tmp_path: Path) -> None:
    before = read_model(model)
    first, second = (delta_of(patch, before) for patch in two)
    found = merge(tmp_path / "out", "task_arithmetic", [f"{model}+{patch}" for patch in two], model)
    for name, tensor in before.items():
        assert torch.equal(found[name], (tensor.float() + (first[name] + second[name])).to(tensor.dtype))


def test_an_edit_of_a_patched_model(two: list[Path], model: Path, probe: Path, tmp_path: Path) -> None:
    """Editing, and patching, on top of a patch is doing so on what the patch gave."""
    for name, start in (("on-files", tmp_path / "first"), ("on-patch", f"{model}+{two[0]}")):
        mergebench.run(plan_edit(str(start), probe, rows="10%", alpha=2.0, layers="3-5"), tmp_path / name)
    third = tmp_path / "on-files" / PATCH
    mergebench.run(plan_patch(f"{model}+{two[0]}", third), tmp_path / "applied")

    assert same(read_model(tmp_path / "on-files"), read_model(tmp_path / "on-patch"))
    assert same(read_model(tmp_path / "on-files"), read_model(tmp_path / "applied"))


# -- as a LoRA ---------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 48, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = SIZES | {
    "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
CLASSES: dict[str, tuple[Any, str]] = {
    "llama": (transformers.LlamaConfig(**LLAMA), "gate_proj"),
    "llama-down": (transformers.LlamaConfig(**LLAMA), "down_proj"),
    "llama-square": (transformers.LlamaConfig(**LLAMA | {"intermediate_size": WIDTH}), "down_proj"),
    "phi3": (transformers.Phi3Config(**LLAMA), "gate_proj"),
    "gpt2": (transformers.GPT2Config(**SIZES, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=2), "gate_proj"),
    "gpt2-square": (
        transformers.GPT2Config(**SIZES, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=2, n_inner=WIDTH),
        "*.mlp.c_*.weight",
    ),
}  # fmt: skip


def saved(config: Any, folder: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


def edited(model: Path, out: Path, target: str, rows: str = "40%") -> Path:
    weight = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(7))
    probe = write_probe(out.with_suffix(".safetensors"), weight)
    mergebench.run(plan_edit(str(model), probe, rows=rows, alpha=0.3, target=target), out)
    return out / PATCH


def quietly(make: Any) -> Any:
    """peft asks transformers by an old name; any other warning is an error."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return make()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_peft_loads_the_lora_and_gives_the_edited_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from peft import PeftModel

    config, target = CLASSES[name]
    model = saved(config, tmp_path / "model", dtype)
    patch = edited(model, tmp_path / "edited", target)
    patch_to_lora(str(model), patch, tmp_path / "lora")
    plain, wanted = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("model", "edited"))
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = wanted(ids).logits
        switched = quietly(lambda: PeftModel.from_pretrained(plain, tmp_path / "lora"))
        torch.testing.assert_close(
            switched(ids).logits, logits, rtol=0.1 if dtype == torch.bfloat16 else 1e-4, atol=0.05
        )
        with switched.disable_adapter():
            off = switched(ids).logits
        merged = switched.merge_and_unload().state_dict()

    assert not torch.allclose(off.float(), logits.float(), atol=1e-3)  # a switch that does something
    changed = 0
    for key, value in wanted.state_dict().items():
        if torch.equal(value, before[key]):
            assert torch.equal(merged[key], value), key
        else:
            # PEFT rounds what it adds, then the sum: one unit of the larger of the two
            size = torch.maximum(value.abs(), before[key].abs()).clamp(min=1e-6)
            unit = torch.finfo(dtype).eps * 2 ** torch.ceil(torch.log2(size.float()))
            assert ((merged[key].float() - value.float()).abs() <= unit).all(), key
            changed += 1
    assert changed == len(open_patch(patch).names)

    ours = merge(tmp_path / "ours", "passthrough", [f"{model}+{tmp_path / 'lora'}"])
    for key, value in read_model(tmp_path / "edited").items():
        torch.testing.assert_close(ours[key], value, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_the_loras_factors(tmp_path: Path) -> None:
    """Fused halves are one module, with zeros in B for the half, and the rows, that stay."""
    model = saved(CLASSES["phi3"][0], tmp_path / "model", torch.float32)
    patch = open_patch(edited(model, tmp_path / "edited", "gate_proj"))
    patch_to_lora(str(model), patch.file, tmp_path / "lora")
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())

    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (1, 1, False)
    assert config["target_modules"] == ["gate_up_proj"]
    for name in patch.names:
        a, b = (factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{f}.weight"] for f in "AB")
        change = patch.change(name)
        assert torch.equal(a, patch.direction[None]) and b.shape == (48, 1)
        assert torch.equal(b[change.numbers, 0], change.amounts) and int((b != 0).sum()) == len(change.numbers)
        assert not b[24:].any()


def test_what_is_no_lora(tmp_path: Path) -> None:
    settings = LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    fused = saved(transformers.GptOssConfig(**settings), tmp_path / "fused", torch.float32)
    apart = saved(transformers.MixtralConfig(**LLAMA | {"num_local_experts": 2}), tmp_path / "apart", torch.float32)
    for model, said in ((fused, "no LoRA for experts in one tensor"), (apart, "PEFT finds no module of that name")):
        patch = edited(model, tmp_path / f"{model.name}-edited", "gate_proj")
        with pytest.raises(ModelError, match=said) as caught:
            patch_to_lora(str(model), patch, tmp_path / "lora")
        assert caught.value.hint == "use the patch as it is: MODEL+PATCH, or mergebench patch apply"
        assert not (tmp_path / "lora").exists()
        copy = merge(tmp_path / f"{model.name}-copy", "passthrough", [f"{model}+{patch}"])
        assert same(copy, read_model(tmp_path / f"{model.name}-edited"))


# -- the command line --------------------------------------------------------------------------------------------


def test_there_and_back(two: list[Path], model: Path, tmp_path: Path, cli: Cli) -> None:
    patch = two[1]
    gone = cli("patch", "revert", "--model", tmp_path / "second", "--patch", patch, "--out", tmp_path / "back")
    again = cli("patch", "apply", "--model", tmp_path / "back", "--patch", patch, "--out", tmp_path / "again", "--json")

    assert (gone.code, gone.out.strip()) == (0, str(tmp_path / "back"))
    assert "taken out of" in gone.err and "surgery (rows 60%, step -0.441, select" in gone.err
    assert again.code == 0 and json.loads(again.out)["edits"][0]["reverted"] is False and not again.err
    assert same(read_model(model), read_model(tmp_path / "back"))
    assert same(read_model(tmp_path / "second"), read_model(tmp_path / "again"))


def test_show(two: list[Path], tmp_path: Path, cli: Cli) -> None:
    shown, looked, told = (
        cli(*command, two[1]) for command in (("patch", "show"), ("inspect",), ("inspect", "--json"))
    )
    document = json.loads(told.out)
    changed = {one["name"]: (one["changed"], one["side"]) for one in document["tensors"]}
    read = open_patch(two[1])

    assert shown.code == 0 and shown.out == looked.out
    assert shown.out.startswith("surgery (rows 60%, step -0.441, ")
    total = sum(count for count, _ in changed.values())
    assert f"{total} vectors of {WIDTH} elements in {len(changed)} tensors" in shown.out
    assert changed == {n: (len(read.numbers(n)), "columns" if "down" in n else "rows") for n in read.names}
    assert changed.keys() <= {GATE.format(i).replace("gate", n) for i in range(LAYERS) for n in ("gate", "up", "down")}
    assert document["length"] == pytest.approx(float(read.direction.norm()))


def test_inspecting_a_patched_model(two: list[Path], model: Path, cli: Cli) -> None:
    shown = cli("inspect", f"{model}+{two[0]}")

    assert "+ row_patch " in shown.out and f"changed by {two[0]}" in shown.out


def test_a_patch_knows_the_model_it_was_made_on(two: list[Path], model: Path, tmp_path: Path, cli: Cli) -> None:
    """On another one it is put all the same, with a note; on the way to it, or on top of a delta, nothing is said."""
    other = write_model(tmp_path / "other", gated(torch.bfloat16, seed=5), config=CONFIG)
    for on, said in ((model, False), (other, True), (f"{model}+{two[1]}", False)):
        shown = cli("inspect", f"{on}+{two[0]}")
        assert shown.code == 0 and ("made on another model: its base is" in shown.err) == said
        recipe = write_recipe(tmp_path / "recipe.yaml", "passthrough", [f"{on}+{two[0]}"])
        assert ("made on another model" in cli("plan", str(recipe)).err) == said


def test_to_lora(two: list[Path], model: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("patch", "to-lora", two[0], "--model", model, "--out", tmp_path / "lora")
    twice = cli("patch", "to-lora", two[0], "--model", model, "--out", tmp_path / "lora")
    inside = cli("patch", "to-lora", two[0], "--model", model, "--out", two[0].parent, "--overwrite")

    assert (done.code, done.out.strip()) == (0, str(tmp_path / "lora"))
    assert twice.code == 2 and "--overwrite" in twice.err
    assert inside.code == 2 and two[0].is_file()

    tensors = load_file(two[0])
    spoilt = tensors | {"direction": tensors["direction"] * torch.nan}
    save_file(spoilt, tmp_path / "nan.safetensors", read_header(two[0]).metadata)
    nan = cli("patch", "to-lora", tmp_path / "nan.safetensors", "--model", model, "--out", tmp_path / "nan")
    assert nan.code == 1 and "hold NaN or infinity" in nan.err and not (tmp_path / "nan").exists()


def test_an_output_is_never_the_patchs_own_folder(two: list[Path], model: Path, cli: Cli) -> None:
    """--overwrite would replace it, and the patch with it."""
    done = cli("patch", "apply", "--model", model, "--patch", two[0], "--out", two[0].parent, "--overwrite")

    assert done.code == 2 and "choose another --out" in done.err
    assert two[0].is_file()


def test_a_merge_of_patches_by_a_recipe(two: list[Path], model: Path, tmp_path: Path, cli: Cli) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml", "ties", [f"{model}+{patch}" for patch in two], model, parameters={"density": 1.0}
    )
    done = cli("merge", recipe, "--out", tmp_path / "out")
    lost = cli("merge", write_recipe(tmp_path / "s.yaml", "ties", [f"{model}+{tmp_path}/no.safetensors"], model))

    assert done.code == 0
    assert lost.code == 3 and "no.safetensors" in lost.err


def test_the_wrong_thing_in_the_wrong_place(two: list[Path], model: Path, tmp_path: Path, cli: Cli) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    out = ("--out", tmp_path / "out")
    for command, code, said in (
        (("patch", "show", tmp_path / "x.safetensors"), 3, "not a patch"),
        (("patch", "show", tmp_path / "y.safetensors"), 3, "no such file"),
        (("patch", "apply", "--model", two[0], "--patch", two[0], *out), 3, "it is a file of deltas, not a model"),
        (("patch", "apply", "--model", f"{model}+{two[0]}", "--patch", two[0], *out), 3, "already edited"),
        (("patch", "revert", "--model", model, "--patch", two[0], *out), 3, "does not have this edit"),
        (("patch", "to-lora", two[0], "--model", tmp_path / "none", *out), 3, "none"),
        (("patch",), 2, ""),
    ):
        ran = cli(*command)
        assert (ran.code, len(ran.err.splitlines()) <= 2 or not said) == (code, True), ran
        assert said in ran.err
        assert not (tmp_path / "out").exists()
