"""Writing shards: what comes out is what the safetensors library reads, however it was put in."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mergebench.checkpoint.files import TORCH_DTYPE, Files, whole, write_atomically, write_error
from mergebench.checkpoint.header import INDEX, ITEM_SIZE, SINGLE, TensorInfo, read_header
from mergebench.checkpoint.shards import ALIGN, OutTensor, Shard, ShardFiles, create, lay_out, write_index
from mergebench.errors import RunError

in_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
names = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")


@st.composite
def specs(draw: Any, most: int = 5) -> list[OutTensor]:
    made = []
    for name in draw(st.lists(names, min_size=1, max_size=most, unique=True)):
        dtype = draw(st.sampled_from(sorted(TORCH_DTYPE)))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        made.append(OutTensor(name, dtype, shape, torch.Size(shape).numel() * ITEM_SIZE[dtype]))
    return made


def values(spec: OutTensor, seed: int) -> Tensor:
    raw = torch.tensor(list(random.Random(seed).randbytes(spec.nbytes)), dtype=torch.uint8)
    if spec.dtype == "BOOL":
        raw &= 1
    return raw.view(TORCH_DTYPE[spec.dtype])


def written(folder: Path, shard: Shard) -> ShardFiles:
    """The shard's file in `folder`, created and ready to be filled."""
    create(folder / shard.file, shard)
    return ShardFiles(folder, [shard])


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


@in_folder
@given(specs(), st.integers(0, 99), st.integers(1, 4))
def test_the_library_reads_what_was_written(tmp_path: Path, tensors: list[OutTensor], seed: int, threads: int) -> None:
    """In pieces of any size, in any order, from several threads."""
    file = tmp_path / "model.safetensors"
    content = {spec.name: values(spec, seed + at) for at, spec in enumerate(tensors)}
    order = random.Random(seed)
    pieces = []
    for spec in tensors:
        total, start = len(content[spec.name]), 0
        while start < total:
            stop = order.randint(start + 1, total)
            pieces.append((spec.name, start, stop))
            start = stop
    order.shuffle(pieces)

    writer = written(tmp_path, Shard(file.name, tuple(tensors)))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda piece: writer.write(piece[0], piece[1], content[piece[0]][piece[1] : piece[2]]), pieces))
    writer.close()

    loaded = load_file(file)
    assert loaded.keys() == content.keys()
    for spec in tensors:
        assert loaded[spec.name].dtype == TORCH_DTYPE[spec.dtype]
        assert tuple(loaded[spec.name].shape) == spec.shape
        assert bits(loaded[spec.name]) == bits(content[spec.name])
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    found = read_header(file)
    assert [(t.name, t.dtype, t.shape, t.nbytes) for t in found.tensors] == [one[:4] for one in tensors]
    assert found.tensors[0].offset % ALIGN == 0


def test_reads_and_writes_that_stop_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may take, or give, fewer bytes than it was asked to."""
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, raw, at: pwrite(file, raw[:100], at))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: preadv(file, [buffers[0][:100]], at))
    content = torch.arange(1000.0)
    writer = written(tmp_path, Shard("x", (OutTensor("a", "F32", (1000,), 4000),)))
    writer.write("a", 0, content)
    writer.close()
    (tensor,) = read_header(tmp_path / "x").tensors
    with Files() as files:
        assert torch.equal(whole(files, tensor), content)
    assert torch.equal(load_file(tmp_path / "x")["a"], content)


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    """Cut off while its data are read: an error, no endless loop, no old bytes."""
    create(tmp_path / "x", Shard("x", (OutTensor("a", "F32", (1000,), 4000),)))
    (tensor,) = read_header(tmp_path / "x").tensors
    with pytest.raises(RunError, match="became shorter"), Files() as files:
        whole(files, tensor)
        os.truncate(tmp_path / "x", 2000)
        whole(files, tensor)


def test_the_file_has_its_size_from_the_start(tmp_path: Path) -> None:
    """A full disk shows when a shard is begun; the bytes not written yet are zeros."""
    shard = Shard("x", (OutTensor("a", "F32", (1000,), 4000),))
    create(tmp_path / "x", shard)
    assert (tmp_path / "x").stat().st_size == len(shard.header) + 4000
    assert (tmp_path / "x").stat().st_blocks * 512 >= 4000
    assert torch.equal(load_file(tmp_path / "x")["a"], torch.zeros(1000))


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_mode_by_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        create(tmp_path / "x", Shard("x", ()))
        write_atomically(tmp_path / "y", "text")
    finally:
        os.umask(before)
    for name in ("x", "y"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask


def test_what_stood_there_is_gone(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff" * 10_000)
    create(tmp_path / "x", Shard("x", (OutTensor("a", "F32", (4,), 16),)))
    assert torch.equal(load_file(tmp_path / "x")["a"], torch.zeros(4))


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    """Neither by a shard that was written, nor by one that could not be."""
    small = Shard("y", (OutTensor("a", "F32", (4,), 16),))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    shard = Shard("x", (OutTensor("a", "F32", (1 << 60,), 4 << 60),))
    for _ in range(3):
        with pytest.raises(RunError, match="cannot be written"):
            create(tmp_path / "x", shard)
        with pytest.raises(RunError, match="cannot be written"):
            create(tmp_path / "nowhere" / "x", shard)
        with pytest.raises(RunError, match="cannot be written"):
            ShardFiles(tmp_path / "nowhere", [small]).write("a", 0, torch.zeros(4))
        files = written(tmp_path, small)
        files.write("a", 0, torch.zeros(4))
        files.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


FREE, ELSEWHERE = "free some space", "name a place that you may write to"


@pytest.mark.parametrize("number, advice", [
    (errno.ENOSPC, FREE), (errno.EDQUOT, FREE), (errno.EFBIG, FREE), (errno.EACCES, ELSEWHERE),
    (errno.EROFS, ELSEWHERE), (errno.ENOTDIR, None),
])  # fmt: skip
def test_what_may_not_be_written_gets_advice(number: int, advice: str | None) -> None:
    error = write_error(Path("out/x"), OSError(number, os.strerror(number)))
    assert error.message == f"out/x: cannot be written: {os.strerror(number)}"
    assert error.hint == advice


# -- layout ------------------------------------------------------------------------------------------


@given(specs(most=12), st.integers(1, 400), st.data())
def test_layout(tensors: list[OutTensor], size: int, data: st.DataObject) -> None:
    """Every tensor once, in order; the base's files are kept apart; cut only where a shard would grow too large."""
    files = [Path(f"{number}.safetensors") for number in range(3)]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tensors)), min_size=2, max_size=2)))
    file_of = {t.name: files[sum(at >= cut for cut in cuts)] for at, t in enumerate(tensors)}
    infos = [TensorInfo(t.name, t.dtype, t.shape, file_of[t.name], 0, t.nbytes) for t in tensors]
    stored = {t.name: "BF16" if t.dtype in ("F32", "F64") else t.dtype for t in tensors}

    shards = lay_out(infos, stored, size)

    laid = [tensor for shard in shards for tensor in shard.tensors]
    assert [(t.name, t.dtype, t.shape) for t in laid] == [(t.name, stored[t.name], t.shape) for t in tensors]
    for tensor in laid:
        assert tensor.nbytes == torch.Size(tensor.shape).numel() * ITEM_SIZE[tensor.dtype]
    for shard in shards:
        assert shard.tensors and len({file_of[tensor.name] for tensor in shard.tensors}) == 1
        assert shard.nbytes == sum(tensor.nbytes for tensor in shard.tensors)
        assert shard.nbytes <= size or sum(tensor.nbytes > 0 for tensor in shard.tensors) == 1
    for one, other in pairwise(shards):
        same_file = file_of[one.tensors[0].name] == file_of[other.tensors[0].name]
        assert not same_file or one.nbytes + other.tensors[0].nbytes > size
    if len(shards) == 1:
        assert shards[0].file == SINGLE
    else:
        count = len(shards)
        assert [s.file for s in shards] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def test_index(tmp_path: Path) -> None:
    first, second = OutTensor("b", "F32", (2,), 8), OutTensor("a", "BF16", (3,), 6)
    write_index(tmp_path, [Shard("one", (first, second))])
    assert not (tmp_path / INDEX).exists()
    write_index(tmp_path, [Shard("one", (first,)), Shard("two", (second,))])
    index = json.loads((tmp_path / INDEX).read_text())
    assert index == {"metadata": {"total_size": 14}, "weight_map": {"a": "two", "b": "one"}}
    assert list(index["weight_map"]) == ["a", "b"]


def test_atomic_files(tmp_path: Path) -> None:
    """The old text or the new one, never half; a failure is one of our errors."""
    write_atomically(tmp_path / "x", "old")
    write_atomically(tmp_path / "x", "n\u00ebw")
    assert (tmp_path / "x").read_bytes() == "n\u00ebw".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    with pytest.raises(RunError, match="cannot be written"):
        write_atomically(tmp_path / "nowhere" / "x", "text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "inside").mkdir()
    with pytest.raises(RunError, match="cannot be written"):
        write_atomically(tmp_path / "full", "text")
