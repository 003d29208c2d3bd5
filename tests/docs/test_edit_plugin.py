"""The edit of docs/plugins.md, run as a reader would: what it takes out is gone."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from models import read_model, write_model
from safetensors.torch import load_file

import mergebench
from mergebench.editing import edits
from tests.editing.conftest import CONFIG, WIDTH, gated, write_probe

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")


def test_the_edit_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "@edit" in block)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    exec(code, module.__dict__)
    monkeypatch.setattr(edits, "get", lambda name: {"ablate": module.ablate}[name])
    model = write_model(tmp_path / "model", gated(torch.float32), config=CONFIG)
    probe = write_probe(
        tmp_path / "probe.safetensors", torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(7))
    )
    step = {"edit": "ablate", "probe": str(probe), "target": "down_proj"}
    recipe = mergebench.load({"merge_method": "passthrough", "models": [{"model": str(model)}], "edits": [step]})
    mergebench.run(mergebench.plan(recipe), tmp_path / "out")
    before, after, v = read_model(model), read_model(tmp_path / "out"), load_file(probe)["weight"][1]

    for name, tensor in before.items():
        if "down_proj" in name:  # what neurons write: columns
            assert (after[name].T @ v).abs().max() < 1e-4 < (tensor.T @ v).abs().max()
            torch.testing.assert_close(tensor - torch.outer(v, v @ tensor) / (v @ v), after[name], rtol=0, atol=1e-5)
        else:
            assert torch.equal(tensor, after[name])
