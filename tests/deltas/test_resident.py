"""What an open delta says it holds is what torch allocates for it, when it is opened and for a tile."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergebench.checkpoint.files import Files
from mergebench.checkpoint.header import read_header
from mergebench.checkpoint.kind import Part

ROWS, COLUMNS, RANK = 512, 1024, 32


def _normal(*shape: int) -> Tensor:
    return 0.1 * torch.randn(shape)


KINDS: dict[str, Any] = {
    "fourier": ({"coefficients": _normal(5000)}, {"seed": 3}),
    "wavelet": ({"coefficients": _normal(9000)}, {"seed": 3, "wavelet": "sym10"}),
    "dora": (
        {"b": _normal(ROWS, RANK), "a": _normal(RANK, COLUMNS), "magnitude": _normal(COLUMNS)}, {"columns": True}
    ),
    "vector_bank": (
        {"bank": _normal(90, 128), "logits_b": _normal(4, RANK, 90), "logits_a": _normal(RANK, 8, 90)}, {"topk": 8}
    ),
    "butterfly": ({"blocks": _normal(1, 4, 256, 256), "factors": _normal(ROWS, 1)}, {}),
    "reflected": ({"normals": _normal(COLUMNS, RANK)}, {}),
    "blockwise": ({"blocks": _normal(ROWS // 64, 64, 64)}, {}),
    "scattered": ({"values": _normal(90_000), "indices": torch.randperm(ROWS * COLUMNS)[:90_000].int()}, {}),
    "circulant": ({"kernel": _normal(1, 2, 512)}, {}),
    "rebased": (
        {
            "basis": torch.eye(ROWS), "scales": _normal(ROWS), "values": _normal(3000),
            "places": torch.randint(ROWS, (2, 3000)),
        },
        {"columns": True},
    ),
}  # fmt: skip


class Base:
    def __init__(self, values: Tensor) -> None:
        self._values = values.view(-1)

    def read(self, start: int, out: Tensor) -> None:
        out.copy_(self._values[start : start + len(out)])


@pytest.mark.parametrize("name", KINDS)
def test_resident_is_what_is_allocated(tmp_path: Path, name: str) -> None:
    parts, settings = KINDS[name]
    kind = getattr(importlib.import_module(f"mergebench.deltas.{name}"), name)
    save_file(parts, tmp_path / "parts.safetensors")
    stored = {info.name: Part(info) for info in read_header(tmp_path / "parts.safetensors").tensors}
    delta, base = kind.on((ROWS, COLUMNS), stored, **settings), Base(_normal(ROWS, COLUMNS))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with Files() as files, torch.profiler.profile(activities=activities, profile_memory=True) as seen:
        opened = delta.open(files, torch.device("cpu"), base)
        tile = torch.empty(opened.rows * COLUMNS)
        base.read(0, tile)
        opened.fold(0, tile.view(-1, COLUMNS))
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 0 and delta.resident() / 4 < peak < 1.5 * delta.resident(), (peak / 2**20, delta.resident() / 2**20)
