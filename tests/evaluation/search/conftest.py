"""A small search: an encoder, two fine-tunes of it with a head each, tasks to choose on and tasks to report on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from models import fine_tuned
from safetensors.torch import load_file, save_file

from tests.evaluation.conftest import write_data, write_encoder, write_head

TASKS = ("one", "two")


def write_suite(place: Path, *splits: str) -> Path:
    """Tasks `one` and `two` in each of the splits; JSON is YAML."""
    tasks = [
        {
            "name": name,
            "kind": "text-classification",
            "data": f"{name}-{split}.jsonl",
            "head": f"{name}/head.safetensors",
            "split": split,
        }
        for split in splits
        for name in TASKS
    ]
    file = place / "suite.yaml"
    file.write_text(json.dumps({"tasks": tasks}))
    return file


def write_search(place: Path, **parameters: Any) -> Path:
    """Everything in `place`, and its recipe."""
    place.mkdir(parents=True, exist_ok=True)
    base = write_encoder(place / "base")
    tensors = load_file(base / "model.safetensors")
    for number, name in enumerate(TASKS):
        shutil.copytree(base, place / name)
        save_file(fine_tuned(tensors, number, 0.2), place / name / "model.safetensors", metadata={"format": "pt"})
        write_head(place / name, seed=number)
        for seed, split in enumerate(("test", "validation")):
            write_data(place / f"{name}-{split}.jsonl", count=61, seed=10 * number + seed)
    write_suite(place, "test", "validation")
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": name} for name in TASKS],
        "parameters": {"density": 0.5, **parameters},
        "evaluate": {"suite": "suite.yaml", "baselines": ["linear"]},
    }
    file = place / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    return file


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("made") / "work"
    write_search(folder)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, a copy of `made`."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"
