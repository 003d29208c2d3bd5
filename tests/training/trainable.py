"""Tiny models and data to train on: labels that follow from the words, prompts whose completions follow from them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from encoders import WORDS, write_encoder
from language import write_decoder

from mergebench.deltas.open import open_model
from mergebench.networks.network import Network
from mergebench.training.attached import Base


def write_labelled(path: Path, count: int, seed: int, name: str = "item") -> Path:
    """Texts of known words; the label says whether most of them are of the first half."""
    source = random.Random(seed)
    lines = []
    for number in range(count):
        words = source.choices(WORDS, k=source.randint(3, 12))
        first = sum(WORDS.index(word) < len(WORDS) // 2 for word in words)
        row = {
            "id": f"{name}-{number}",
            "text": " ".join(words),
            "label": "first" if 2 * first > len(words) else "second",
        }
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_completions(path: Path, count: int, seed: int, name: str = "item") -> Path:
    """Prompts of letters whose completion is the first of them."""
    source = random.Random(seed)
    lines = []
    for number in range(count):
        prompt = "".join(source.choices("abcdef", k=source.randint(2, 6)))
        lines.append(json.dumps({"id": f"{name}-{number}", "prompt": prompt, "completion": prompt[0]}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def classify(folder: Path, **more: Any) -> dict[str, Any]:
    """A config on a tiny encoder and labelled texts, all in `folder`."""
    write_encoder(folder / "base")
    parts = {"train": 96, "validation": 24, "test": 24}
    files = {
        part: str(write_labelled(folder / f"{part}.jsonl", count, seed, part))
        for seed, (part, count) in enumerate(parts.items())
    }
    task = {"kind": "text-classification", **files, "max_length": 16}
    return {"model": str(folder / "base"), "task": task, "epochs": 1, "batch": 16, "lr": 3e-3, **more}


def complete(folder: Path, **more: Any) -> dict[str, Any]:
    """A config on a tiny language model and prompts with completions."""
    write_decoder(folder / "base")
    parts = {"train": 48, "validation": 12, "test": 12}
    files = {
        part: str(write_completions(folder / f"{part}.jsonl", count, seed, part))
        for seed, (part, count) in enumerate(parts.items())
    }
    return {
        "model": str(folder / "base"),
        "task": {"kind": "completion", **files},
        "epochs": 1,
        "batch": 8,
        "lr": 3e-3,
        **more,
    }


def base_of(directory: Path, auto_class: str = "AutoModel", seed: int = 0) -> Base:
    """A model in memory, to put something on."""
    model = open_model(str(directory))
    network = Network(model, auto_class, torch.device("cpu"), packed=False)
    return Base(model, network, torch.Generator().manual_seed(seed))
