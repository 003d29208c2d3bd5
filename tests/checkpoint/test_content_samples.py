"""The sample of a file: a hash of each tensor's own bytes, whichever neighbours are read with it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from models import SINGLE, write_model

from mergebench.checkpoint.content import AT_ONCE, ELEMENTS, PIECES, sample_of
from mergebench.checkpoint.header import read_header


def test_small_neighbours_have_the_hashes_of_tensors_alone(tmp_path: Path) -> None:
    sizes = [3, PIECES * ELEMENTS, 0, 1, PIECES * ELEMENTS + 1, *[700] * (AT_ONCE // 2000), 2]
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    tensors = {f"t{number:03}": torch.randn(size).to(kinds[number % 3]) for number, size in enumerate(sizes)}
    file = write_model(tmp_path / "model", tensors) / SINGLE
    header, content, hashes = read_header(file), file.read_bytes(), []
    for info in header.tensors:
        raw, size = content[info.offset : info.offset + info.nbytes], info.nbytes // max(info.numel, 1)
        if info.numel > PIECES * ELEMENTS:
            starts = [number * (info.numel - ELEMENTS) // (PIECES - 1) * size for number in range(PIECES)]
            raw = b"".join(raw[start : start + ELEMENTS * size] for start in starts)
        hashes.append(hashlib.sha256(raw).hexdigest())
    assert sample_of(header) == hashlib.sha256(json.dumps([header.sha256, hashes]).encode()).hexdigest()
