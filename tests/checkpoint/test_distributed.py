"""Shards of ranks, written by torch.distributed.checkpoint and read as torch's own reader reads them."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

import mergebench
from mergebench.checkpoint.model import open_checkpoint
from mergebench.errors import MergebenchError
from tests.conftest import Cli

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class InPieces(DefaultSavePlanner):
    """Saves every tensor in pieces of at most three along each of its sides, as ranks of a mesh would."""

    def create_local_plan(self) -> SavePlan:
        items: list[WriteItem] = []
        for item in super().create_local_plan().items:
            size = item.tensor_data.size if item.tensor_data is not None else ()
            if not len(size):
                items.append(item)
                continue
            corners: list[tuple[int, ...]] = [()]
            for side in size:
                corners = [(*corner, at) for corner in corners for at in range(0, side, 3)]
            properties = TensorProperties(dtype=self.state_dict[item.index.fqn].dtype)
            for number, corner in enumerate(corners):
                sizes = torch.Size(min(3, side - at) for at, side in zip(corner, size, strict=True))
                chunk = ChunkStorageMetadata(torch.Size(corner), sizes)
                index = MetadataIndex(item.index.fqn, corner, number)
                items.append(
                    WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, size))
                )
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type is not WriteItemType.SHARD or write_item.tensor_data is None:
            return super().resolve_data(write_item)
        chunk = write_item.tensor_data.chunk
        cut = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
        return self.state_dict[write_item.index.fqn][cut]


def save(state: Mapping[str, Any], place: Path, planner: DefaultSavePlanner | None = None) -> None:
    writer = dcp.FileSystemWriter(place, thread_count=2)
    dcp.save(dict(state), storage_writer=writer, planner=planner or InPieces(), no_dist=True)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(11, 4, generator=random),
        "layers.0.weight": torch.randn(7, 8, generator=random).bfloat16(),
        "layers.0.kernel": torch.randn(2, 5, 4, generator=random).half(),
        "layers.0.bias": torch.randn(5, generator=random).double(),
        "scale": torch.tensor(0.5),
        "transposed": torch.randn(4, 6, generator=random).T,
        "steps": torch.arange(6),
        "mask": torch.tensor([True, False]),
    }


def read(place: Path) -> dict[str, Tensor]:
    from mergebench.checkpoint.files import Files, whole

    model = open_checkpoint(str(place), place)
    with Files() as files:
        return {name: whole(files, info) for name, info in model.tensors.items()}


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0)


@pytest.mark.parametrize("planner", [InPieces, DefaultSavePlanner])
def test_it_is_read_as_torch_reads_it(tmp_path: Path, planner: type[DefaultSavePlanner]) -> None:
    save(tensors(), tmp_path, planner())
    assert len([*tmp_path.glob("*.distcp")]) == 2
    oracle = {name: torch.zeros_like(value) for name, value in tensors().items()}
    dcp.load(oracle, checkpoint_id=tmp_path, no_dist=True)

    same(read(tmp_path), oracle)


@pytest.mark.parametrize(
    "state",
    [
        lambda model: {"model": model, "optimizer": {"state": {"m": torch.ones(3)}}, "step": 5},
        lambda model: {"app": {"model": model, "optim": {"m": torch.ones(3)}}},
        lambda model: {"state_dict": model, "epoch": torch.tensor(1), "optimizer_states": [torch.ones(2)]},
        lambda model: {f"module.{name}": value for name, value in model.items()},
        lambda model: {f"_orig_mod.{name}": value for name, value in model.items()},
        lambda model: {"model": {f"_fsdp_wrapped_module.{name}": value for name, value in model.items()}},
        lambda model: {**model, "optimizer.m": torch.ones(2)},
    ],
)
def test_the_models_part_of_a_runs_state(tmp_path: Path, state: Any) -> None:
    save(state(tensors()), tmp_path, DefaultSavePlanner())

    same(read(tmp_path), tensors())


def test_names_that_begin_with_model_stay(tmp_path: Path) -> None:
    """`model.` is a part of transformers' names, and a key of the state only where it is one."""
    named = {f"model.{name}": value for name, value in tensors().items()}
    save(named, tmp_path / "bare")
    save({"model": named}, tmp_path / "nested")

    same(read(tmp_path / "bare"), named)
    same(read(tmp_path / "nested"), named)


def test_a_tensor_without_elements(tmp_path: Path) -> None:
    save({"w": torch.ones(2), "none": torch.zeros(0, 4)}, tmp_path, DefaultSavePlanner())

    same(read(tmp_path), {"w": torch.ones(2), "none": torch.zeros(0, 4)})


def test_what_is_no_tensor_is_said(tmp_path: Path) -> None:
    save({"model": {"w": torch.ones(3), "block._extra_state": {"amax": [1.0]}}}, tmp_path, DefaultSavePlanner())

    assert open_checkpoint("x", tmp_path).remarks == ("block._extra_state.amax: no tensor, left out",)


def floats(seed: int) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in tensors(seed).items() if value.is_floating_point()}


def test_checkpoints_of_a_run_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    save_file(floats(9), "base/model.safetensors")
    Path("base/config.json").write_text("{}")
    for step in (2, 10):
        save({"model": floats(step)}, Path(f"run/checkpoint-{step}/pytorch_model_fsdp_0"))
        save({"optimizer": {"m": torch.ones(3)}}, Path(f"run/checkpoint-{step}/optimizer_0"))
    Path("r.yaml").write_text(
        "merge_method: linear\nbase_model: base\nmodels: run/checkpoint-*\nschedule: {weights: [1, 3]}\n"
    )

    ran = cli("merge", "r.yaml", "--out", "out")

    assert ran.code == 0 and "note" not in ran.err
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "README.md", "config.json", "mergebench.json", "model.safetensors"
    ]  # fmt: skip
    merged = load_file("out/model.safetensors")
    for name, value in floats(2).items():
        wanted = (0.25 * value.float() + 0.75 * floats(10)[name].float()).to(value.dtype)
        torch.testing.assert_close(merged[name], wanted)


def test_shards_alone_become_one_file_and_the_missing_config_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save({"model": floats(1)}, Path("shards"))
    recipe = {"merge_method": "passthrough", "models": [{"model": "shards"}]}

    plan = mergebench.plan(recipe)
    mergebench.merge(recipe, "out")

    assert [note for note in plan.merge.notes if "no config.json lies beside these shards" in note]
    same(load_file("out/model.safetensors"), floats(1))


def test_its_config_lies_beside_the_folder_of_shards(tmp_path: Path) -> None:
    save({"model": floats(1)}, tmp_path / "pytorch_model_fsdp_0")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    for place in (tmp_path, tmp_path / "pytorch_model_fsdp_0"):
        assert open_checkpoint("x", place).config["model_type"] == "llama"


class Harm:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.file),))


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    save(tensors(), tmp_path)
    whole = pickle.loads((tmp_path / ".metadata").read_bytes())
    whole.planner_data = {"harm": Harm(tmp_path / "made")}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(whole))

    same(read(tmp_path), tensors())

    assert not (tmp_path / "made").exists()


def cut(place: Path) -> None:
    file = max(place.glob("*.distcp"), key=lambda one: one.stat().st_size)
    file.write_bytes(file.read_bytes()[:-700])


def overwrite(place: Path) -> None:
    file = next(place.glob("*.distcp"))
    file.write_bytes(b"\0" * file.stat().st_size)


def rename(place: Path) -> None:
    whole = pickle.loads((place / ".metadata").read_bytes())
    next(iter(whole.storage_data.values())).relative_path = "../x.distcp"
    (place / ".metadata").write_bytes(pickle.dumps(whole))


def lose_a_piece(place: Path) -> None:
    whole = pickle.loads((place / ".metadata").read_bytes())
    whole.state_dict_metadata["embed.weight"].chunks.pop()
    (place / ".metadata").write_bytes(pickle.dumps(whole))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda place: (place / ".metadata").write_bytes(b"x"), "not readable as metadata of shards"),
        (lambda place: (place / ".metadata").write_bytes(pickle.dumps({"a": 1})), "not readable as metadata"),
        (lambda place: next(place.glob("*.distcp")).unlink(), "which is missing"),
        (lambda place: (place / ".metadata").unlink(), "holds no .safetensors file"),
        (cut, "not readable as a tensor"),
        (overwrite, "not readable as a tensor"),
        (rename, "outside its directory"),
        (lose_a_piece, "not readable as metadata of shards"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, damage: Any, what: str) -> None:
    save(tensors(), tmp_path)
    damage(tmp_path)

    with pytest.raises(MergebenchError) as caught:
        open_checkpoint("x", tmp_path)

    assert what in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ({"optimizer": {"m": torch.ones(3)}}, "it holds no weights of a model"),
        ({"model": {"_fsdp_wrapped_module._flat_param": torch.ones(3)}}, "flat parameters"),
        ({"model": {"w": torch.ones(3, dtype=torch.complex128)}}, "its type is not supported"),
    ],
)
def test_what_is_no_model(tmp_path: Path, state: Any, what: str) -> None:
    save(state, tmp_path, DefaultSavePlanner())

    with pytest.raises(MergebenchError, match=what):
        open_checkpoint("x", tmp_path)


def test_two_folders_of_shards(tmp_path: Path) -> None:
    save({"model": floats(1)}, tmp_path / "pytorch_model_fsdp_0")
    shutil.copytree(tmp_path / "pytorch_model_fsdp_0", tmp_path / "pytorch_model_fsdp_1")

    with pytest.raises(MergebenchError, match="2 folders of shards") as caught:
        open_checkpoint("x", tmp_path)

    assert "pytorch_model_fsdp_1" in (caught.value.hint or "")


TWO_RANKS = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
if dist.get_rank() == 0:
    torch.save(model.state_dict(), sys.argv[1] + ".pt")
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=sys.argv[1])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_fsdp_on_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TWO_RANKS)
    place = tmp_path / "shards"

    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "train.py", str(place)]
    subprocess.run(run, check=True, cwd=tmp_path, capture_output=True, timeout=300)

    assert len([*place.glob("*.distcp")]) == 2
    same(read(place), torch.load(f"{place}.pt", weights_only=True))
