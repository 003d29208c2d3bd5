"""Small banks of random tensors, with the shapes that a run writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergebench.systems.mos.bank import Bank, BankWriter, read_bank
from mergebench.systems.mos.manifest import About, AdapterKind, Backbone, Features

BLOCKS, RANK, WIDTH = ("layers.0", "layers.1"), 2, 6
TASKS = (("a", "b"), ("c",), ("d", "e", "f"))


def about(**changes: Any) -> About:
    """The settings of a small bank."""
    settings: dict[str, Any] = {
        "mergebench": "0", "backbone": Backbone(model="base", sha256="0" * 64),
        "features": Features(kind="text", pooling="cls", max_length=16),
        "adapter": AdapterKind(kind="bottleneck", scale=0.5, bottleneck=RANK),
        "statistics": "variance", "semantics": "paper", "alpha": 0.1, "seed": 0,
    }  # fmt: skip
    return About(**{**settings, **changes})


def parts(
    before: int, classes: int, seed: int, blocks: Sequence[str] = BLOCKS, width: int = WIDTH, **changes: Any
) -> dict[str, Any]:
    """What a task of so many classes hands to the writer, after `before` classes of the tasks before it."""
    source = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    shapes = {"down.weight": (RANK, width), "down.bias": (RANK,), "up.weight": (width, RANK), "up.bias": (width,)}
    given = {
        "adapter": {f"{block}.{part}": random(*shape) for block in blocks for part, shape in shapes.items()},
        "head": (random(before + classes, width), random(before + classes)),
        "trained": (random(classes, width), random(classes)),
        "statistics": {
            "mean": random(classes, width),
            "count": torch.full((classes,), 4),
            "variance": random(classes, width).square(),
        },
        "prototype": random(classes, width),
        "frozen": random(classes, width),
    }
    return {**given, **changes}


def write_bank(
    directory: Path,
    tasks: Sequence[Sequence[str]] = TASKS,
    blocks: Sequence[str] = BLOCKS,
    width: int = WIDTH,
    **changes: Any,
) -> Path:
    """A bank of these tasks' classes."""
    writer, before = BankWriter(directory, about(**changes)), 0
    for number, classes in enumerate(tasks):
        writer.add(classes, **parts(before, len(classes), number, blocks, width))
        before += len(classes)
    return directory


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    """Three tasks of two, one and three classes."""
    return read_bank(write_bank(tmp_path / "bank"))
