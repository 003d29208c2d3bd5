"""What lies beside the weights: copied, replaced, counted."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

import mergebench
from mergebench.checkpoint.content import Contents, identity, tokenizer_hash
from mergebench.checkpoint.reference import HUB_FILES
from mergebench.checkpoint.side_files import copy_side_files, decisive_files, side_files, tokenizer_files
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.conftest import Cli
from tests.models import tiny_tensors, write_model, write_recipe

TOKENIZER = [
    "a.tiktoken",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "tokenizer.json",
    "vocab.txt",
]
DECISIVE = ["config.json", "generation_config.json", "preprocessor_config.json"]
OTHERS = ["modeling_custom.py", "notes.txt"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    place: Path = write_model(tmp_path / "model", tiny_tensors())
    for name in (*TOKENIZER, *DECISIVE, *OTHERS):
        (place / name).write_text("{}")
    (place / "tokenizer").mkdir()
    return place


def test_another_tokenizer_takes_the_place_of_all_its_files(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    changed = replace(open_model(str(model)), tokenizer_files={"tokenizer.json": b"new"})
    copied = copy_side_files(changed, tmp_path / "out", None)["side_files"]
    assert sorted(copied) == sorted([*DECISIVE, *OTHERS, "tokenizer.json"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(copied)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == b"new"


ALONG = [
    *("LICENSE", "LICENSE.md", "Notice", "USE_POLICY.md", "THIRD_PARTY_NOTICES.txt"),
    *("tokenizer.model.v3", "vocab.bpe", "bpe.codes", "tekken.json", "params.json", "__init__.py", "training_utils.py"),
    *("layers/__init__.py", "layers/deep/block.py", "additional_chat_templates/tool_use.jinja"),
    *("1_Pooling/config.json", "sub/2_Dense/config.json", "modules.json"),
]
STAY = {
    "another format of the weights": [
        "pytorch_model.bin",
        "tf_model.h5",
        "model.onnx",
        "model-q4.gguf",
        "flax_model.msgpack",
    ],
    "weights of no model": ["head.safetensors", "patch.safetensors"],
    "the run's state": [
        "trainer_state.json",
        "optimizer.pt",
        "rng_state_0.pth",
        "training_args.bin",
        "zero_to_fp32.py",
    ],
    "the run's scores": ["all_results.json", "eval_results.txt", "logs.csv"],
    "an adapter": ["adapter_config.json", "adapter_model.bin"],
    "of a folder": ["layers/block.bak", "sub/2_Dense/pytorch_model.bin"],
    "whole folders": ["checkpoint-5/", "eval/", "onnx/", "original/"],
}
INSIDE = ["checkpoint-5/model.safetensors", "checkpoint-5/modeling_x.py", "eval/scores.json", "onnx/model.onnx"]
INSIDE += ["onnx/config.json", "original/consolidated.00.pth", "original/params.json", "original/code/model.py"]
UNSAID = ["README.md", "mergebench.json", "evaluation.json", ".cache/x.json", "__pycache__/x.py"]
UNSAID += ["model.safetensors.index.json", "pytorch_model.bin.index.json"]
LIST = [{"path": ""}, {"path": "1_Pooling"}, {"path": "sub/2_Dense"}, {"path": "3_Normalize"}, {"path": "../other"}]


def test_what_goes_along(model: Path, tmp_path: Path) -> None:
    """Decided by what a file is: part of the model, its weights, or of the run that made them."""
    stays = [name for names in STAY.values() for name in names]
    for name in [*ALONG, *(name for name in [*stays, *INSIDE] if not name.endswith("/")), *UNSAID]:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name)
    (model / "modules.json").write_text(json.dumps(LIST))
    write_model(model / "sub/2_Dense", {"linear.weight": torch.ones(2, 2)}, config=None)
    write_model(tmp_path / "other", {"linear.weight": torch.ones(2, 2)})
    (model / "linked").symlink_to(tmp_path / "other")
    (model / "linked_code").symlink_to(model / "layers")
    os.mkfifo(model / "pipe.json")
    (tmp_path / "out").mkdir()
    done = copy_side_files(open_model(str(model)), tmp_path / "out", None)
    along = sorted([*ALONG, *TOKENIZER, *DECISIVE, *OTHERS])
    assert sorted(done["side_files"]) == along
    assert sorted(done["left_behind"]) == sorted([*stays, "linked/", "linked_code/", "pipe.json"])
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in written) == along
    assert all((tmp_path / "out" / name).read_bytes() == (model / name).read_bytes() for name in along)


def test_what_stays_is_said(model: Path, tmp_path: Path, cli: Cli) -> None:
    """In one line, by every command that writes a model, unless it is to be quiet; in the provenance as well."""
    for number in range(7):
        (model / f"rng_state_{number}.pth").write_bytes(b"")
    recipe = write_recipe(tmp_path / "r.json", "linear", [model, write_model(tmp_path / "other", tiny_tensors())])
    vector = cli("task-vector", tmp_path / "other", "--base", model, "--out", tmp_path / "vector")
    merge, fold = ("merge", recipe), ("adapters", "fold", tmp_path / "vector", "--base", model)
    told = [cli(*command, "--out", tmp_path / command[0]) for command in (merge, fold)]
    listed = ", ".join(f"rng_state_{number}.pth" for number in range(6))
    for ran in (vector, *told):
        assert f"not copied from the base: {listed} and 1 more" in ran.err.splitlines()
    assert cli(*merge, "--out", tmp_path / "quiet", "-q").err == ""
    provenance = json.loads((tmp_path / "merge/mergebench.json").read_text())
    assert provenance["left_behind"] == [f"rng_state_{number}.pth" for number in range(7)]


def test_what_is_copied_is_downloaded() -> None:
    for name in [*ALONG, *TOKENIZER, *DECISIVE, *OTHERS, "2_Dense/pytorch_model.bin", "2_Dense/model.safetensors"]:
        assert any(fnmatchcase(name, pattern) for pattern in HUB_FILES), name


@pytest.mark.parametrize("config, names", [({"model_type": "llama"}, True), ({"_class_name": "UNet2DModel"}, False)])
def test_a_config_of_transformers_names_the_type(tmp_path: Path, config: dict[str, str], names: bool) -> None:
    """Diffusers warns of every key it does not know."""
    model = open_model(str(write_model(tmp_path / "model", tiny_tensors(), config=config)))
    (tmp_path / "out").mkdir()
    copy_side_files(model, tmp_path / "out", "BF16")
    assert ("dtype" in json.loads((tmp_path / "out/config.json").read_text())) == names


@pytest.mark.parametrize(
    ("keys", "written"),
    [(["torch_dtype"], "torch_dtype"), (["torch_dtype", "dtype"], "dtype"), (["dtype"], "dtype"), ([], "dtype")],
)
def test_the_key_that_names_the_type(tmp_path: Path, keys: list[str], written: str) -> None:
    """Older programs read torch_dtype, and newer ones either."""
    config = {"model_type": "llama", **dict.fromkeys(keys, "float32")}
    model = open_model(str(write_model(tmp_path / "model", tiny_tensors(), config=config)))
    (tmp_path / "out").mkdir()
    copy_side_files(model, tmp_path / "out", "BF16")
    found = json.loads((tmp_path / "out/config.json").read_text())
    assert [key for key, value in found.items() if value == "bfloat16"] == [written]
    assert found.keys() == {"model_type", *keys, written}


def test_what_counts(model: Path) -> None:
    """Results kept under these hashes are found again by later versions."""
    assert [path.name for path in tokenizer_files(model)] == TOKENIZER
    assert [path.name for path in decisive_files(model)] == sorted([*TOKENIZER, *DECISIVE])
    assert not tokenizer_files(model / "nowhere")
    opened = open_model(str(model))
    assert identity(opened) == "e42cd72e83753b34"
    pairs = b"".join(f"\n{name} 2\n{{}}".encode() for name in TOKENIZER)
    assert tokenizer_hash(model) == hashlib.sha256(pairs).hexdigest()
    names = ["model.safetensors", *sorted([*TOKENIZER, *DECISIVE])]
    listed = [(name, hashlib.sha256((model / name).read_bytes()).hexdigest()) for name in names]
    assert Contents(None).of_model(opened) == hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def test_links(model: Path, tmp_path: Path) -> None:
    """Those that stay in the model's directory, or lead from a snapshot of the hub cache to its blobs, are followed."""
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_text("a secret")
    (model / "inside.txt").symlink_to("notes.txt")
    (tmp_path / "linked").symlink_to(model)
    (tmp_path / "out").mkdir()
    for place in (model, tmp_path / "linked"):
        assert "inside.txt" in copy_side_files(open_model(str(place)), tmp_path / "out", None)["side_files"]
        assert (tmp_path / "out/inside.txt").read_text() == "{}"
    for link in (elsewhere, Path("../elsewhere.txt"), Path("../linked/../elsewhere.txt")):
        (model / "added_tokens.txt").unlink(missing_ok=True)
        (model / "added_tokens.txt").symlink_to(link)
        with pytest.raises(ModelError, match=r"added_tokens.txt: a link out of the model's directory, to /"):
            copy_side_files(open_model(str(model)), tmp_path / "out", None)
    assert not (tmp_path / "out/added_tokens.txt").exists()
    snapshot = tmp_path / "cache/models--a--b/snapshots/0123"
    write_model(snapshot, tiny_tensors())
    blob = tmp_path / "cache/models--a--b/blobs/abc"
    blob.parent.mkdir()
    blob.write_text("word")
    (snapshot / "vocab.txt").symlink_to("../../blobs/abc")
    assert "vocab.txt" in copy_side_files(open_model(str(snapshot)), tmp_path / "out", None)["side_files"]
    (tmp_path / "blobs").mkdir()
    elsewhere = elsewhere.rename(tmp_path / "blobs/elsewhere.txt")  # of no hub cache
    (snapshot / "notes.txt").symlink_to("../../../../blobs/elsewhere.txt")
    with pytest.raises(ModelError, match=r"notes.txt: a link out of"):
        copy_side_files(open_model(str(snapshot)), tmp_path / "out", None)


def test_a_directory_of_links(model: Path, tmp_path: Path) -> None:
    """`ln -s DIR/* .`: what stands beside the weights under the same name may be copied, nothing else."""
    (model / ".env").write_text("a secret")
    farm, out = tmp_path / "farm", tmp_path / "out"
    for place in (farm, out):
        place.mkdir()
    for file in model.iterdir():
        (farm / file.name).symlink_to(file)
    (farm / ".env").unlink()
    assert copy_side_files(open_model(str(farm)), out, None)["side_files"] == side_files(open_model(str(model))).copied
    assert all((out / name).read_bytes() == (model / name).read_bytes() for name in TOKENIZER)
    (tmp_path / "elsewhere/model").mkdir(parents=True)
    (tmp_path / "elsewhere/config.json").write_text('{"auths": "a secret"}')
    secrets = {"vocab.txt": ".env", "merges.txt": "notes.txt", "config.json": "../elsewhere/config.json"}
    for name, secret in secrets.items():
        (farm / name).unlink()
        (farm / name).symlink_to(model / secret)
        with pytest.raises(ModelError, match=rf"{name}: a link out of the model's directory") as caught:
            side_files(open_model(str(farm)))
        assert caught.value.hint == f"put the file itself there, or link to the {name} beside the weights"
        (farm / name).unlink()
        (farm / name).symlink_to(model / name)


def test_a_link_is_refused_before_the_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.txt").write_text("a secret")
    (model / "vocab.txt").unlink()
    (model / "vocab.txt").symlink_to("../elsewhere.txt")
    planned = mergebench.plan(mergebench.load({"merge_method": "linear", "models": [{"model": str(model)}]}))
    with pytest.raises(ModelError, match=r"vocab.txt: a link out of"):
        mergebench.run(planned, tmp_path / "out")
    large = write_model(tmp_path / "large", {"layers.0.weight": torch.randn(16, 16)})
    (large / "vocab.txt").symlink_to("../elsewhere.txt")
    work: list[int] = []
    with pytest.raises(ModelError, match=r"vocab.txt: a link out of"):
        mergebench.compress(str(large), tmp_path / "out", ratio=2, progress=lambda *done: work.append(1))
    assert not work
    assert not (tmp_path / ".out.partial").exists()
