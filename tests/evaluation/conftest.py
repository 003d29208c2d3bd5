"""What the evaluation tests share: tiny real models and tasks on disk, written by the libraries users have."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import HIDDEN, WORDS, write_encoder
from safetensors.torch import load_file, save_file
from torch import Tensor

LABELS = ("bad", "good", "none")


@dataclass(frozen=True)
class Files:
    """The least a model must be: its files, read whole."""

    side_directory: Path
    reference: str = "tiny"

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.float() for name, tensor in load_file(self.side_directory / "model.safetensors").items()}


def write_head(
    directory: Path, labels: Sequence[str] = LABELS, seed: int = 1, hidden: int = HIDDEN, **metadata: str
) -> Path:
    """`head.safetensors` with random weights; metadata given as "" is left out."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "weight": torch.randn(len(labels), hidden, generator=generator),
        "bias": torch.randn(len(labels), generator=generator),
    }
    about = {
        "pooling": "mean",
        "normalize": "false",
        "max_length": "24",
        "labels": json.dumps(list(labels)),
        **metadata,
    }
    path = directory / "head.safetensors"
    save_file(tensors, path, metadata={name: value for name, value in about.items() if value})
    return path


def write_data(path: Path, count: int = 41, seed: int = 2, longest: int = 30) -> Path:
    """Texts of one to `longest` known and unknown words, with random labels."""
    source = random.Random(seed)
    rows = [
        {
            "id": f"item-{number}",
            "text": " ".join(source.choices([*WORDS, "unknown"], k=source.randint(1, longest))),
            "label": source.choice(LABELS),
        }
        for number in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT; read only."""
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `data.jsonl` and `a/head.safetensors`."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data.jsonl")
    write_head(tmp_path / "a")
    return tmp_path


@pytest.fixture
def entry() -> Callable[..., dict[str, Any]]:
    """One task of a suite as `place` has it; keys given as None are left out."""

    def make(**changes: Any) -> dict[str, Any]:
        whole = {"name": "a", "kind": "text-classification", "data": "data.jsonl", "head": "a/head.safetensors"}
        return {key: value for key, value in {**whole, **changes}.items() if value is not None}

    return make
