"""Models whose weights lie in folders: pipelines of diffusers, and sentence-transformers with the encoder in one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergebench
from mergebench.checkpoint.naming import components, encoder_folder
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError, RecipeError
from mergebench.networks.verify import check_known
from tests.conftest import Cli
from tests.models import write_model

UNET, VAE, TEXT = "unet", "vae", "text_encoder"
STEM = "diffusion_pytorch_model"
CONFIGS = {
    "unet/config.json": '{"_class_name": "UNet2DConditionModel"}',
    "vae/config.json": '{"_class_name": "AutoencoderKL"}',
    "text_encoder/config.json": '{"model_type": "clip_text_model", "dtype": "float32"}',
    "tokenizer/vocab.json": "{}",
    "scheduler/scheduler_config.json": '{"prediction_type": "epsilon"}',
}


def weights(seed: int) -> dict[str, dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    sizes = {
        UNET: [("conv_in.weight", (4, 2, 3, 3)), ("mid.to_q.weight", (4, 4))],
        VAE: [("conv_in.weight", (2, 3)), ("conv_in.bias", (2,))],
    }
    sizes[TEXT] = [("text_model.embeddings.weight", (6, 4))]
    return {part: {n: torch.randn(s, generator=random) for n, s in some} for part, some in sizes.items()}


def pipeline(place: Path, seed: int, *, shards: bool = False, variant: str = "") -> dict[str, dict[str, Tensor]]:
    """A pipeline as diffusers saves it, and its weights."""
    parts = weights(seed)
    listed: dict[str, Any] = {part: ["diffusers", "A"] for part in (*parts, "tokenizer", "scheduler")}
    listed |= {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    for name, text in CONFIGS.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    (place / "model_index.json").write_text(json.dumps(listed))
    for part, tensors in parts.items():
        stem = "model" if part == TEXT else STEM
        if not (shards and part == UNET):
            save_file(tensors, place / part / f"{stem}{variant}.safetensors")
            continue
        files = {name: f"{stem}-{at:05d}-of-00002.safetensors" for at, name in enumerate(tensors, 1)}
        for name, file in files.items():
            save_file({name: tensors[name]}, place / part / file)
        (place / part / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return parts


def merged(out: Path, models: list[Path], **more: Any) -> Path:
    data = {"merge_method": "linear", "models": [{"model": str(one)} for one in models], **more}
    mergebench.run(mergebench.plan(mergebench.load(data), device="cpu"), out)
    return out


def stored(place: Path, part: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in (place / part).glob("*.safetensors"):
        found |= load_file(file)
    return found


def means(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: (a[name] + b[name]) / 2 for name in a}


def equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    torch.testing.assert_close(dict(sorted(found.items())), dict(sorted(expected.items())))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_pipeline_of_two(tmp_path: Path, shards: bool, variant: str) -> None:
    """Each component under its library's names, sharded where the base's is; the rest is the base's."""
    a = pipeline(tmp_path / "a", 1, shards=shards, variant=variant)
    b = pipeline(tmp_path / "b", 2)
    save_file({"x": torch.ones(2)}, tmp_path / "a/whole-model.safetensors")  # the same in one file, as on the hub
    (tmp_path / "a/unet/diffusion_pytorch_model.bin").write_bytes(b"")
    out = merged(tmp_path / "out", [tmp_path / "a", tmp_path / "b"])
    for part in a:
        equal(stored(out, part), means(a[part], b[part]))
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    unet = [f"unet/{STEM}-00001-of-00002.safetensors", f"unet/{STEM}-00002-of-00002.safetensors"]
    unet = [*unet, f"unet/{STEM}.safetensors.index.json"] if shards else [f"unet/{STEM}.safetensors"]
    others = {f"vae/{STEM}.safetensors", "text_encoder/model.safetensors", "README.md", "mergebench.json"}
    assert files == {*unet, *others, *CONFIGS, "model_index.json"}
    if shards:
        placed = json.loads((out / f"unet/{STEM}.safetensors.index.json").read_text())["weight_map"]
        assert placed == json.loads((tmp_path / f"a/unet/{STEM}.safetensors.index.json").read_text())["weight_map"]
    assert all((out / name).read_text() == text for name, text in CONFIGS.items())
    assert "library_name: diffusers" in (out / "README.md").read_text()


def test_components_are_chosen_by_their_folder(tmp_path: Path) -> None:
    a, b = pipeline(tmp_path / "a", 1), pipeline(tmp_path / "b", 2)
    both = [tmp_path / "a", tmp_path / "b"]
    for number, chosen in enumerate([{"include": ["unet/*"]}, {"exclude": ["vae/*", "text_encoder/*"]}]):
        out = merged(tmp_path / f"out{number}", both, **chosen)
        equal(stored(out, UNET), means(a[UNET], b[UNET]))
        equal(stored(out, VAE), a[VAE])
        equal(stored(out, TEXT), a[TEXT])
    out = merged(tmp_path / "unet", [tmp_path / "a/unet", tmp_path / "b/unet"])  # a component by itself
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", "config.json", f"{STEM}.safetensors", "mergebench.json",
    ]  # fmt: skip
    equal(load_file(out / f"{STEM}.safetensors"), means(a[UNET], b[UNET]))


def test_a_component_is_no_pipeline(tmp_path: Path, cli: Cli) -> None:
    pipeline(tmp_path / "a", 1)
    for pair in (["a", "a/vae"], ["a/vae", "a"]):
        with pytest.raises(ModelError, match=r"a/vae is a component, .*a a pipeline of several") as caught:
            merged(tmp_path / "out", [tmp_path / name for name in pair])
        assert f"merge it with {tmp_path}/a/vae" in (caught.value.hint or "")
    code, out, _ = cli("inspect", tmp_path / "a")
    assert code == 0 and out.startswith("pipeline of unet, vae, text_encoder: 5 tensors")
    with pytest.raises(RecipeError, match="it is a pipeline of diffusers"):
        check_known(open_model(str(tmp_path / "a")))


def test_shards_of_a_component_are_cut(tmp_path: Path) -> None:
    a, b = pipeline(tmp_path / "a", 1), pipeline(tmp_path / "b", 2)
    data = {"merge_method": "linear", "models": [{"model": str(tmp_path / name)} for name in "ab"]}
    mergebench.run(mergebench.plan(mergebench.load(data), device="cpu", shard_size=100), tmp_path / "out")
    assert len(list((tmp_path / "out/unet").glob("*.safetensors"))) == 2
    again = open_model(str(tmp_path / "out")).state_dict()
    expected = {f"{part}/{name}": value for part in a for name, value in means(a[part], b[part]).items()}
    equal(again, expected)


def test_a_component_that_is_missing_or_a_pickle(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        pipeline(tmp_path / name, 1)
    (tmp_path / f"b/vae/{STEM}.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        merged(tmp_path / "out", [tmp_path / "a", tmp_path / "b"])
    assert "vae/conv_in." in caught.value.message and '["vae/*"]' in (caught.value.hint or "")
    (tmp_path / "c/unet/x.bin").write_bytes(b"")
    (tmp_path / f"c/unet/{STEM}.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        open_model(str(tmp_path / "c"))
    assert "its component unet has no safetensors file, only x.bin" in caught.value.message
    assert "DiffusionPipeline" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "text", ["[]", "no JSON", '{"unet": ["diffusers", "A"], "../x": ["a", "b"], "vae": [null, null]}']
)
def test_what_is_listed_as_a_component(tmp_path: Path, text: str) -> None:
    for folder in ("model/unet", "model/vae", "x"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "model/model_index.json").write_text(text)
    assert components(tmp_path / "model") == (("unet",) if text.startswith("{") else ())


# -- sentence-transformers -------------------------------------------------------------------------------

LIST = [{"path": path} for path in ("0_Transformer", "1_Pooling", "2_Dense")]
SIDE = {
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "2_Dense/config.json": '{"in_features": 4}',
    "0_Transformer/sentence_bert_config.json": '{"max_seq_length": 20}',
    "0_Transformer/tokenizer_config.json": "{}",
    "config_sentence_transformers.json": "{}",
}


def sentence(place: Path, seed: int, folder: str = "0_Transformer") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model of sentence-transformers, and the weights of its encoder and of its linear layer."""
    random = torch.Generator().manual_seed(seed)
    encoder = {"embeddings.weight": torch.randn(6, 4, generator=random), "layer.0.w": torch.randn(4, generator=random)}
    dense = {"linear.weight": torch.randn(2, 4, generator=random)}
    write_model(place / folder, encoder, config={"model_type": "bert", "dtype": "float32"})
    for name, text in SIDE.items():
        (place / name.replace("0_Transformer", folder or ".")).parent.mkdir(parents=True, exist_ok=True)
        (place / name.replace("0_Transformer", folder or ".")).write_text(text)
    save_file(dense, place / "2_Dense/model.safetensors")
    listed = [{"path": folder if one["path"] == "0_Transformer" else one["path"]} for one in LIST]
    (place / "modules.json").write_text(json.dumps(listed))
    return encoder, dense


@pytest.mark.parametrize("other", ["0_Transformer", ""])
def test_the_encoder_in_a_folder_is_the_model(tmp_path: Path, other: str) -> None:
    """It merges with one that lies beside the list of modules, and the other way round; the type goes to its config."""
    one, two = sentence(tmp_path / "a", 1), sentence(tmp_path / "b", 2, other)
    assert encoder_folder(tmp_path / "a") == "0_Transformer"
    out = merged(tmp_path / "out", [tmp_path / "a", tmp_path / "b"], dtype="float16")
    half = [{name: value.half() for name, value in means(a, b).items()} for a, b in zip(one, two, strict=True)]
    equal(load_file(out / "0_Transformer/model.safetensors"), half[0])
    equal(load_file(out / "2_Dense/model.safetensors"), half[1])
    assert json.loads((out / "0_Transformer/config.json").read_text())["dtype"] == "float16"
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    made = {"README.md", "mergebench.json", "2_Dense/model.safetensors", "modules.json"}
    assert files == {*SIDE, *made, "0_Transformer/model.safetensors", "0_Transformer/config.json"}
    assert "library_name: sentence-transformers" in (out / "README.md").read_text()
    back = merged(tmp_path / "back", [tmp_path / "b", tmp_path / "a"], dtype="float16")
    equal(load_file(back / other / "model.safetensors"), half[0])


def test_an_encoder_in_a_folder_has_its_adapters_and_its_tokenizer(tmp_path: Path) -> None:
    sentence(tmp_path / "a", 1)
    model = open_model(str(tmp_path / "a"))
    assert model.config["model_type"] == "bert" and model.side_directory == tmp_path / "a/0_Transformer"
    assert "embeddings.weight" in model.tensors and "2_Dense/linear.weight" in model.tensors
