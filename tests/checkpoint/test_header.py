"""Reading headers: the safetensors library is the oracle; whatever a file holds, the answer is one of our errors."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import pack
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mergebench.checkpoint.files import TORCH_DTYPE, Files, whole
from mergebench.checkpoint.header import FLOATS, FP8, ITEM_SIZE, MAX_HEADER_BYTES, Stamp, read_header
from mergebench.errors import MergebenchError, ModelError, RunError

in_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

names = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3)
dtypes = st.sampled_from(sorted(TORCH_DTYPE))


@st.composite
def tensors(draw: Any) -> dict[str, torch.Tensor]:
    """Any names, types and shapes; the bytes are drawn too."""
    made = {}
    for name in draw(st.lists(names, max_size=5, unique=True)):
        dtype, shape = draw(dtypes), draw(shapes)
        size = ITEM_SIZE[dtype] * int(torch.Size(shape).numel())
        raw = draw(st.binary(min_size=size, max_size=size))
        if dtype == "BOOL":
            raw = bytes(byte & 1 for byte in raw)
        flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        made[name] = flat.view(TORCH_DTYPE[dtype]).reshape(shape)
    return made


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


@in_folder
@given(tensors(), st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1))
def test_reads_what_the_library_wrote(tmp_path: Path, written: dict[str, torch.Tensor], metadata: Any) -> None:
    file = tmp_path / "model.safetensors"
    save_file(written, file, metadata=metadata)
    header = read_header(file)
    assert header.file == file and header.stamp == Stamp.of(file.stat())
    assert header.metadata == (metadata or {})
    assert {tensor.name for tensor in header.tensors} == written.keys()
    assert [tensor.offset for tensor in header.tensors] == sorted(tensor.offset for tensor in header.tensors)
    raw = file.read_bytes()
    with Files() as files:
        for tensor in header.tensors:
            value = written[tensor.name]
            assert tensor.shape == tuple(value.shape) and tensor.numel == value.numel()
            assert TORCH_DTYPE[tensor.dtype] == value.dtype
            assert tensor.is_float == (tensor.dtype in FLOATS | FP8)
            assert raw[tensor.offset : tensor.offset + tensor.nbytes] == bits(value)
            read = whole(files, tensor)
            assert read.dtype == value.dtype and read.shape == value.shape and bits(read) == bits(value)


def test_the_fingerprint_is_of_the_header(tmp_path: Path) -> None:
    """Other values: the same. Another name, shape or order: another."""

    def fingerprint(**tensors: torch.Tensor) -> str:
        save_file(tensors, tmp_path / "x.safetensors")
        return read_header(tmp_path / "x.safetensors").sha256

    first = fingerprint(a=torch.zeros(4), b=torch.zeros(2))
    assert fingerprint(a=torch.ones(4), b=torch.ones(2)) == first
    assert fingerprint(a=torch.zeros(4), c=torch.zeros(2)) != first
    assert fingerprint(a=torch.zeros(2, 2), b=torch.zeros(2)) != first
    assert fingerprint(a=torch.zeros(2), b=torch.zeros(4)) != first


# -- damage ------------------------------------------------------------------------------------------


def library_reads(file: Path) -> dict[str, tuple[str, list[int]]] | None:
    """What the library finds in a file, or None where it refuses it."""
    try:
        with safe_open(file, "pt") as opened:
            return {
                name: (opened.get_slice(name).get_dtype(), opened.get_slice(name).get_shape())
                for name in opened.offset_keys()
            }
    except SafetensorError:
        return None


def check_like_the_library(file: Path) -> bool:
    """Ours reads it, and finds what the library finds; or refuses it with a line that names the file."""
    try:
        found = read_header(file)
    except MergebenchError as error:
        assert isinstance(error, RunError | ModelError)
        assert str(file) in error.message
        return False
    expected = library_reads(file)
    assert expected is not None, "the library refuses it"
    assert {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in found.tensors} == expected
    return True


HEALTHY: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "empty": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [24, 24]},
    "b": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
}

numbers = st.integers(-2, 40) | st.sampled_from([2**31, 2**63, 2**64, 10**30])
leaves = st.none() | st.booleans() | numbers | st.floats() | st.sampled_from(["", "F32", "F16", "I8", "F4", "x", "0"])
keys = st.sampled_from(["dtype", "shape", "x"])
scraps = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)


@settings(in_folder, max_examples=400)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "empty", "b", "c", "__metadata__"]),
            st.sampled_from(["dtype", "shape", "data_offsets", None]),
            scraps | st.lists(numbers, min_size=2, max_size=2),
        ),
        max_size=3,
    ),
    st.integers(-8, 8),
)
def test_changed_entries(tmp_path: Path, changes: list[tuple[str, str | None, Any]], more: int) -> None:
    """Entries with anything in them: read as the library does, or refused; never another exception."""
    header = json.loads(json.dumps(HEALTHY))
    for name, key, value in changes:
        if key is None or not isinstance(header.get(name), dict):
            header[name] = value
        else:
            header[name][key] = value
    file = tmp_path / "model.safetensors"
    file.write_bytes(pack(header, bytes(32 + more)))
    fine = check_like_the_library(file)
    assert fine or changes or more


@settings(in_folder, max_examples=300)
@given(st.data())
def test_changed_bytes(tmp_path: Path, data: st.DataObject) -> None:
    """Some bytes of a file changed, or its end cut off."""
    raw = bytearray(pack(HEALTHY, bytes(32)))
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 33))] = data.draw(st.integers(0, 255))
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))])
    check_like_the_library(file)


@in_folder
@given(st.binary(max_size=64))
def test_any_bytes(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw)
    check_like_the_library(file)


@in_folder
@given(st.integers(0, 2**64 - 1))
def test_any_claimed_length(tmp_path: Path, length: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + pack(HEALTHY, bytes(32))[8:])
    assert check_like_the_library(file) == (length == len(json.dumps(HEALTHY)))


@pytest.mark.parametrize("shape", [[2**40, 2**40, 0], [0, 2**64], [0, 2**63], [2**62, 2], [2**32, 2**32]])
def test_sides_that_no_computer_has(tmp_path: Path, shape: list[int]) -> None:
    """Also where a side of zero makes the bytes come out right."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(pack({"a": {"dtype": "I8", "shape": shape, "data_offsets": [0, 0]}}, b""))
    with pytest.raises(RunError, match="'a'"):
        read_header(file)


def test_a_huge_claim_is_not_believed(tmp_path: Path) -> None:
    """No memory is set aside for a header that the file cannot hold."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES) + b"{}")
    with pytest.raises(RunError, match="the file has 10"):
        read_header(file)
    file.write_bytes(struct.pack("<Q", 2**64 - 1) + b"{}")
    with pytest.raises(RunError, match="the format allows 100000000"):
        read_header(file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        read_header(tmp_path / "nowhere.safetensors")


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    """A plan's first look costs no import of torch."""
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    code = (
        "import sys; from mergebench.deltas.open import open_model; "
        f"open_model({str(tmp_path)!r}); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers', 'safetensors')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
