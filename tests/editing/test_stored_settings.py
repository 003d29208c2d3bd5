"""What a probe and a patch say of themselves is checked where it is read, whatever another program wrote there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import pack, tiny_tensors, unpack, write_model
from safetensors.torch import save_file

from mergebench.deltas.open import open_model
from mergebench.editing.patches import open_patch, write_patch
from mergebench.editing.probes.probe import read_probe
from mergebench.editing.summary import facts, sentence
from mergebench.errors import RunError
from tests.evaluation.page.documents import edit

DEEP = "[" * 5000


@pytest.mark.parametrize("about, says", [
    ({"test_accuracy": "0.5", "majority": 0.5, "n_test": 9}, "test_accuracy: must be a finite number"),
    ({"test_accuracy": 7, "majority": 0.5, "n_test": 9}, "test_accuracy: must be a share"),
    ({"test_accuracy": 0.5, "majority": float("nan"), "n_test": 9}, "majority: must be a finite number"),
    ({"test_accuracy": 0.5, "majority": 0.4, "n_test": -9}, "n_test"),
    ({"test_accuracy": 0.5, "majority": 0.4, "n_test": 10**400}, "a number is too large"),
    ({"model": "base"}, "model: must be a mapping, got \"base\""),
    ({"layer": [3]}, "layer: must be a whole number, got a list"),
    ({"pool": "max"}, "pool: must be one of mean, last, got \"max\""),
    (["layer"], "not a JSON object"),
    (DEEP, "nested too deep"),
])  # fmt: skip
def test_a_probe(tmp_path: Path, about: Any, says: str) -> None:
    file, text = tmp_path / "probe.safetensors", about if isinstance(about, str) else json.dumps(about)
    save_file({"weight": torch.eye(2, 4)}, file, metadata={"probe": text})
    with pytest.raises(RunError) as failed:
        read_probe(file)
    assert failed.value.message.startswith(f"{file}: its metadata 'probe': ") and says in failed.value.message


@pytest.mark.parametrize("about, says", [
    ({"probe": {"file": 3}}, "probe.file: must be text, got 3"),
    ({"alpha": "much"}, "alpha: must be a finite number, got \"much\""),
    ({"rows": "9"}, "rows: must be a whole number"),
    ({"parameters": ["alpha"]}, "parameters: must be a mapping, got a list"),
    ({"cosine": {"least": None, "most": 1}}, "cosine.least: must be a finite number, got null"),
    ({"warnings": "none"}, "warnings: must be a list"),
])  # fmt: skip
def test_a_patch(tmp_path: Path, about: dict[str, Any], says: str) -> None:
    model, file = open_model(str(write_model(tmp_path / "model", tiny_tensors()))), tmp_path / "p.safetensors"
    changes = {"layers.0.weight": (torch.tensor([1, 2]), torch.ones(2))}
    write_patch(file, model, torch.ones(8), changes, frozenset(), edit())
    read = open_patch(file)
    assert "surgery" in sentence(read.about) and facts(read.about)
    header, data = unpack(file)
    whole = json.loads(header["__metadata__"]["delta"])
    whole["made"] |= about
    header["__metadata__"]["delta"] = json.dumps(whole)
    file.write_bytes(pack(header, data))
    with pytest.raises(RunError) as failed:
        open_patch(file)
    assert failed.value.message.startswith(f"{file}: not readable as a patch: {says}")
