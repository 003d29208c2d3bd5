"""The delta kind of docs/plugins.md: proved, and used from an installed package like any other kind."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from models import read_model, write_model

from mergebench.testing import check_delta
from tests.conftest import Cli, Ran

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
KIND = next(block for block in BLOCKS if "@delta_kind" in block)
WRITING = next(block for block in BLOCKS if "write_file(" in block)


def test_it_keeps_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    exec(KIND, module.__dict__)
    module.mirrored.function.__module__ = "page"
    check_delta(module.mirrored)


def test_from_an_installed_package(tmp_path: Path, shell: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    site, info = tmp_path / "site", tmp_path / "site" / "my_merges-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "my_merges.py").write_text(KIND, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-merges\nVersion: 1.0\n", encoding="utf-8")
    (entry,) = re.findall(r"group `mergebench\.deltas` \(`(.*?)`\)", PAGE)
    (info / "entry_points.txt").write_text(f"[mergebench.deltas]\n{entry}\n".replace('"', ""), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = read_model(write_model(tmp_path / "base", {"layers.0.weight": torch.randn(5, 8), "norm": torch.ones(8)}))
    scope: dict[str, object] = {"torch": torch}
    exec(WRITING, scope)
    normal = scope["normal"]["normal"]  # type: ignore[index]
    Path("r.yaml").write_text("merge_method: passthrough\nmodels: [{model: base+mirror.safetensors}]\n")
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])

    ran: Ran = shell("merge", "r.yaml", "--out", "out", PYTHONPATH=paths)
    assert ran.code == 0, ran.err
    merged, n = read_model(tmp_path / "out"), normal / normal.norm()
    weight = base["layers.0.weight"]
    torch.testing.assert_close(merged["layers.0.weight"], weight - 2 * torch.outer(weight @ n, n), rtol=1e-5, atol=1e-6)
    assert torch.equal(merged["norm"], base["norm"])
    shown = json.loads(shell("inspect", "base+mirror.safetensors", "--json", PYTHONPATH=paths).out)
    assert [one.get("deltas") for one in shown["tensors"] if one["name"] == "layers.0.weight"] == [["mirrored"]]

    without = shell("inspect", "base+mirror.safetensors", PYTHONPATH=paths, MERGEBENCH_PLUGINS="")
    assert without.code == 2 and "no delta kind is called 'mirrored'" in without.err
