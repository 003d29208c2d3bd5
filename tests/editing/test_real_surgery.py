"""Surgery of a real model against the paper's procedure in ten lines, and back; a split that shares nothing.

python recipes/surgery/fetch.py && python -m pytest -m real tests/editing/test_real_surgery.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Cli

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "recipes" / "surgery"
BASE = ROOT / "recipes" / "smollm2" / "cache" / "base"
LAYERS, ROWS, STEP = 30, 2143, 0.75  # 4.65% of 30 x 1,536 rows

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (PLACE / "cache" / "data").is_dir(), reason="python recipes/surgery/fetch.py fetches it"),
]


def test_the_edit_is_the_papers_and_can_be_taken_back(tmp_path: Path, cli: Cli) -> None:
    probe, out, back = tmp_path / "toxic.safetensors", tmp_path / "edited", tmp_path / "back"
    data = PLACE / "cache" / "data" / "toxic.jsonl"
    assert cli("probe", "fit", "--model", BASE, "--data", data, "--layer", 17, "--out", probe,
               "--results", tmp_path / "results").code == 0  # fmt: skip
    assert cli("edit", "--model", BASE, "--probe", probe, "--step", STEP, "--out", out).code == 0

    wanted = load_file(BASE / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in wanted.items()}
    gates = [wanted[f"model.layers.{layer}.mlp.gate_proj.weight"] for layer in range(LAYERS)]
    every = torch.cat(gates).float()
    row = load_file(probe)["weight"][1]
    lowest = torch.nn.functional.cosine_similarity(every.double(), row.double()[None]).argsort(stable=True)[:ROWS]
    step = STEP * float(every.norm(dim=1).median()) / float(row.norm())
    for number in lowest.tolist():
        layer, at = divmod(number, every.shape[0] // LAYERS)
        gates[layer][at] = (gates[layer][at].float() + step * row).to(gates[layer].dtype)

    edited = load_file(out / "model.safetensors")
    assert all(torch.equal(edited[name], tensor) for name, tensor in wanted.items())

    assert cli("patch", "revert", "--model", out, "--patch", out / "patch.safetensors", "--out", back).code == 0
    reverted = load_file(back / "model.safetensors")
    assert all(torch.equal(reverted[name].view(torch.int16), t.view(torch.int16)) for name, t in before.items())


def test_what_is_learnt_chosen_and_reported_on_is_apart() -> None:
    texts = {}
    for name in ("toxic", "beginnings-test", "beginnings-validation", "beginnings-train"):
        rows = [json.loads(line) for line in (PLACE / "cache/data" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        texts[name] = {row.get("prompt") or row["text"] for row in rows}
        assert len(texts[name]) == len(rows)
    assert len(set().union(*texts.values())) == sum(map(len, texts.values()))
    assert min(map(len, texts.values())) > 180
