"""Which files are a model, and under which names it is written again: those that its library looks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergebench
from mergebench.adapters.extract import extract_adapter
from mergebench.checkpoint.naming import index_of, module_folders
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError, RunError
from mergebench.networks.module import build
from mergebench.networks.verify import verify
from mergebench.systems import pela
from tests.models import INDEX, fine_tuned, names, read_model, tiny_tensors, write_model, write_recipe

BASE, TUNED = tiny_tensors(), fine_tuned(tiny_tensors(), 1)
FLOATS = [name for name, value in BASE.items() if value.is_floating_point()]
DIFFUSERS = "diffusion_pytorch_model"


def mean(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: (one[name] + other[name]) / 2 if one[name].is_floating_point() else one[name] for name in one}


def merged(out: Path, base: Path, other: Path, shard_size: int = 10**9) -> Path:
    data = {"merge_method": "linear", "models": [{"model": str(base)}, {"model": str(other)}]}
    mergebench.run(mergebench.plan(mergebench.load(data), device="cpu", shard_size=shard_size), out)
    return out


def equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def under(folder: Path, stem: str, tensors: Mapping[str, Tensor], shards: int = 1, index: str = "") -> Path:
    """A checkpoint under another stem than transformers'."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"{stem}.safetensors"]
    if shards > 1:
        files = [f"{stem}-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    places = {name: files[at % shards] for at, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name, place in places.items() if place == file}, folder / file)
    if shards > 1:
        (folder / (index or f"{stem}.safetensors.index.json")).write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize("stem", ["model", DIFFUSERS, "open_clip_model", "consolidated"])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_result_has_the_names_of_the_base(tmp_path: Path, stem: str, shards: int) -> None:
    base = under(tmp_path / "base", stem, BASE, shards)
    (tmp_path / "base/head.safetensors").write_bytes((base / names(base)[0]).read_bytes())  # no part of the model
    tuned = write_model(tmp_path / "tuned", TUNED)
    out = merged(tmp_path / "out", base, tuned)
    wanted = [name for name in names(base) if name.startswith(stem)]
    assert [name for name in names(out) if "safetensors" in name] == wanted
    found: dict[str, Tensor] = {}
    for file in wanted:
        found |= load_file(out / file) if file.endswith(".safetensors") else {}
    equal(found, mean(BASE, TUNED))
    if shards > 1:
        placed = json.loads((out / f"{stem}.safetensors.index.json").read_text())["weight_map"]
        assert placed == json.loads((base / f"{stem}.safetensors.index.json").read_text())["weight_map"]
    cut = merged(tmp_path / "cut", base, tuned, shard_size=300)
    assert len([name for name in names(cut) if name.startswith(f"{stem}-0000")]) > 2
    equal(open_model(str(cut)).state_dict(), mean(BASE, TUNED))
    mergebench.task_vector(str(tuned), str(base), tmp_path / "vector")
    assert [name for name in names(tmp_path / "vector") if "safetensors" in name] == wanted
    equal(open_model(f"{base}+{tmp_path / 'vector'}").state_dict(), TUNED)


READ = {  # what lies there, in the order of its writing: stem, which tensors, shards, index
    "a variant beside the file": [(f"{DIFFUSERS}.fp16", TUNED, 1, ""), (DIFFUSERS, BASE, 1, "")],
    "a variant beside shards": [(f"{DIFFUSERS}.fp16", TUNED, 1, ""), (DIFFUSERS, BASE, 2, "")],
    "a variant alone": [(f"{DIFFUSERS}.fp16", BASE, 1, "")],
    "a variant in shards": [(f"{DIFFUSERS}.fp16", BASE, 2, f"{DIFFUSERS}.safetensors.index.fp16.json")],
    "open_clip beside transformers": [("open_clip_model", TUNED, 1, ""), ("model", BASE, 1, "")],
    "a file beside transformers' shards": [("model", BASE, 1, ""), ("model", TUNED, 2, "")],
    "a file beside diffusers' shards": [(DIFFUSERS, TUNED, 1, ""), (DIFFUSERS, BASE, 2, "")],
    "Mistral's file beside transformers' shards": [("consolidated", TUNED, 1, ""), ("model", BASE, 2, "")],
    "another name": [("pytorch_model", BASE, 1, "")],
    "one of one": [("model-00001-of-00001", BASE, 1, "")],
}


@pytest.mark.parametrize("case", READ)
def test_which_files_are_the_model(tmp_path: Path, case: str) -> None:
    for stem, tensors, shards, index in READ[case]:
        under(tmp_path / "model", stem, tensors, shards, index)
    opened = open_model(str(tmp_path / "model"))
    assert {name: info.shape for name, info in opened.tensors.items()} == {n: v.shape for n, v in BASE.items()}
    equal(opened.state_dict(), BASE)
    diffusers = READ[case][0][0].startswith(DIFFUSERS)
    assert opened.naming.stem == (DIFFUSERS if diffusers else "model")


NO_MODEL = {  # files, and what is said of them
    "two models": (["one.safetensors", "other.safetensors"], "2 .safetensors files and no", "name the file that is"),
    "a pipeline": (
        ["model_index.json", "vae/model.safetensors", "unet/x.safetensors"],
        "no .safet",
        "{0}/unet, {0}/vae",
    ),
    "an encoder in a folder": (["modules.json", "0_Transformer/model.safetensors"], "no .safet", "{0}/0_Transformer"),
    "FSDP": (["pytorch_model_fsdp_0/__0_0.distcp"], "no .safet", "without their .metadata"),
    "DeepSpeed": (["latest", "global_step5/mp_rank_00_model_states.pt"], "no .safet", "zero_to_fp32.py"),
}


@pytest.mark.parametrize("case", NO_MODEL)
def test_a_directory_that_is_no_model_is_told_the_way_out(tmp_path: Path, case: str) -> None:
    files, says, hint = NO_MODEL[case]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("[]")
    with pytest.raises(ModelError) as caught:
        open_model(str(tmp_path))
    assert says in caught.value.message and hint.format(tmp_path) in (caught.value.hint or "")


def test_shards_in_another_folder_than_their_index(tmp_path: Path) -> None:
    under(tmp_path / "weights", "model", BASE, 2)
    index = json.loads((tmp_path / "weights" / INDEX).read_text())
    placed = {name: f"weights/{file}" for name, file in index["weight_map"].items()}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(RunError) as caught:
        open_model(str(tmp_path))
    assert "'weights/model-00001-of-00002.safetensors', which is outside" in caught.value.message
    assert caught.value.hint == "put the shards beside the index, and their bare names into it"


def test_variants_in_shards_beside_each_other(tmp_path: Path) -> None:
    """Neither index is the model's; the files are too many to be one."""
    for variant in ("fp16", "bf16"):
        under(tmp_path, f"{DIFFUSERS}.{variant}", BASE, 2, f"{DIFFUSERS}.safetensors.index.{variant}.json")
    with pytest.raises(ModelError, match=r"4 \.safetensors files and no model\.safetensors\.index\.json"):
        open_model(str(tmp_path))


def test_which_index_belongs_to_a_shard() -> None:
    assert index_of("model-00001-of-00002.safetensors") == "model.safetensors.index.json"
    assert index_of(f"{DIFFUSERS}-100000-of-100001.safetensors") == f"{DIFFUSERS}.safetensors.index.json"
    assert index_of("other.safetensors") == "model.safetensors.index.json"


@pytest.mark.parametrize("listed", ["not JSON", "{}", '[{"path": 1}]', '["a"]'])
def test_a_damaged_list_of_modules_names_none(tmp_path: Path, listed: str) -> None:
    (tmp_path / "modules.json").write_text(listed)
    assert module_folders(tmp_path) == ()


def test_modules_lie_in_the_models_directory(tmp_path: Path) -> None:
    paths = ["", "1_Dense", "a/2_Dense", "1_Dense/", "../other", "a/../../other", "/etc"]
    (tmp_path / "modules.json").write_text(json.dumps([{"path": path} for path in paths]))
    assert module_folders(tmp_path) == ("1_Dense", "a/2_Dense")


def test_the_index_is_the_list_of_tensors(tmp_path: Path) -> None:
    """A shard may hold more, of another format. Of a tensor in two shards, libraries take the last."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=12, **size)).save_pretrained(tmp_path / "model", max_shard_size="1KB")
    directory, placed = tmp_path / "model", json.loads((tmp_path / "model" / INDEX).read_text())["weight_map"]
    first, last = load_file(directory / min(placed.values())), directory / max(placed.values())
    doubled = next(iter(first))
    packed = {"layers.1.weight_packed": torch.zeros(4, 4, dtype=torch.uint8), "layers.1.scale": torch.ones(4)}
    save_file(load_file(last) | {doubled: torch.full_like(first[doubled], 9)} | packed, last, metadata={"format": "pt"})
    expected = LlamaForCausalLM.from_pretrained(directory).state_dict()
    opened = open_model(str(directory))
    found = opened.state_dict()
    assert found.keys() == placed.keys() and found[doubled].eq(9).all()
    equal(found, {name: expected[name] for name in placed})
    (remark,) = opened.remarks
    assert remark.startswith(f"{doubled} is in {min(placed.values())} and {last.name}, read from the latter")
    equal(read_model(merged(tmp_path / "out", directory, directory)), found)  # no shard holds more than its index says


# -- modules in folders ----------------------------------------------------------------------------------

DENSE = {"linear.weight": torch.arange(12.0)[:, None] * torch.arange(8.0), "linear.bias": torch.ones(12)}  # of rank 1
SMALL = {"linear.0.weight", "linear.1.weight", "linear.1.bias"}
LIST = [{"path": path} for path in ("", "1_Pooling", "2_Dense", "3_Normalize")]


def sentence(place: Path, tensors: Mapping[str, Tensor], dense: Mapping[str, Tensor], shards: int = 1) -> Path:
    """A model as sentence-transformers saves it: the encoder beside the list of modules, a linear layer in a folder."""
    write_model(place, tensors, shards=shards, side_files={"modules.json": json.dumps(LIST)})
    for folder, more in {"1_Pooling": {}, "2_Dense": dense}.items():
        (place / folder).mkdir()
        (place / folder / "config.json").write_text("{}")
        if more:
            save_file(dict(more), place / folder / "model.safetensors")
    return place


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, dict[str, Tensor]]:
    """Two such models, and the second one's linear layer."""
    other = {name: 1.5 * value for name, value in DENSE.items()}
    return sentence(tmp_path / "a", BASE, DENSE, shards=2), sentence(tmp_path / "b", TUNED, other), other


def in_folders(out: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    assert (out / "1_Pooling/config.json").is_file() and (out / "2_Dense/config.json").is_file()
    return read_model(out), dict(load_file(out / "2_Dense/model.safetensors"))


def test_modules_are_merged_with_the_model(pair: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path) -> None:
    a, b, other = pair
    for size in (10**9, 20):  # a module is one file, as its library reads no index there
        encoder, dense = in_folders(merged(tmp_path / f"out{size}", a, b, size))
        equal(encoder, mean(BASE, TUNED))
        equal(dense, mean(DENSE, other))
    data = {"merge_method": "linear", "models": [{"model": str(a)}, {"model": str(b)}], "exclude": ["2_Dense/*"]}
    mergebench.run(mergebench.plan(mergebench.load(data), device="cpu"), tmp_path / "kept")
    equal(in_folders(tmp_path / "kept")[1], DENSE)


def test_every_writer_keeps_modules(pair: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """A task vector and what is folded from it, EMR's vector and masks, a compressed model made dense again."""
    a, b, other = pair
    mergebench.task_vector(str(b), str(a), tmp_path / "vector")
    equal(in_folders(tmp_path / "vector")[1], {name: other[name] - DENSE[name] for name in DENSE})
    plan = mergebench.plan_fold(str(a), str(tmp_path / "vector"))
    mergebench.run(plan, tmp_path / "folded")
    equal(in_folders(tmp_path / "folded")[1], other)

    recipe = write_recipe(tmp_path / "emr.json", "emr", [b], base=a)
    mergebench.run(mergebench.plan(mergebench.load(recipe), device="cpu"), tmp_path / "emr")
    task = open_model(f"{a}+{tmp_path / 'emr/tasks/b'}").state_dict()
    equal(task, TUNED | {f"2_Dense/{name}": value for name, value in other.items()})

    pela.compress(str(b), tmp_path / "small", energy=0.999)
    assert load_file(tmp_path / "small/2_Dense/model.safetensors").keys() == SMALL
    pela.expand(tmp_path / "small", tmp_path / "dense")
    encoder, dense = in_folders(tmp_path / "dense")
    equal(encoder, TUNED)
    equal(dense, other)


def test_what_runs_the_encoder_alone_leaves_modules_out(tmp_path: Path) -> None:
    """transformers has no place for them, and PEFT no module: --verify, a network, an extracted LoRA."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=12, max_position_embeddings=20, **size))
    config, tensors = bert.config.to_dict() | {"architectures": ["BertModel"]}, bert.state_dict()
    a, b = (
        sentence(tmp_path / "a", tensors, DENSE),
        sentence(tmp_path / "b", fine_tuned(tensors, 1), fine_tuned(DENSE, 2)),
    )
    for place in (a, b):
        (place / "config.json").write_text(json.dumps(config))
    verify(a)
    module, _ = build(open_model(str(a)), "AutoModel", torch.device("cpu"))
    torch.testing.assert_close(module.state_dict()["embeddings.LayerNorm.bias"], tensors["embeddings.LayerNorm.bias"])
    extract_adapter(str(a), str(b), tmp_path / "lora", rank=4)
    stored = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert len(stored) == 2 * 7 and not any("2_Dense" in name for name in stored)


def test_a_module_that_only_one_model_has(tmp_path: Path) -> None:
    plain, with_module = write_model(tmp_path / "plain", BASE), sentence(tmp_path / "b", TUNED, DENSE)
    for base, other in ((plain, with_module), (with_module, plain)):
        with pytest.raises(ModelError, match=r"2_Dense/linear\.bias"):
            merged(tmp_path / "out", base, other)


def test_a_module_whose_weights_are_a_pickle(tmp_path: Path) -> None:
    model = sentence(tmp_path / "model", BASE, {})
    (model / "2_Dense/pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"its module 2_Dense has no model\.safetensors, only pytorch_model\.bin"):
        open_model(str(model))
