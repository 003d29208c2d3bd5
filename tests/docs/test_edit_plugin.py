"""The edit of docs/plugins.md, from Python and from the command line: what it turns round is turned."""

from __future__ import annotations

import os
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
from mergebench.testing import check_edit
from tests.conftest import Cli, Ran
from tests.editing.conftest import CONFIG, WIDTH, gated, write_probe

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")


def test_the_edit_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "@edit" in block)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    exec(code, module.__dict__)
    check_edit(module.reflect)
    monkeypatch.setattr(edits, "get", lambda name: {"reflect": module.reflect}[name])
    model = write_model(tmp_path / "model", gated(torch.float32), config=CONFIG)
    probe = write_probe(
        tmp_path / "probe.safetensors", torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(7))
    )
    step = {"edit": "reflect", "probe": str(probe)}
    recipe = mergebench.load({"merge_method": "passthrough", "models": [{"model": str(model)}], "edits": [step]})
    mergebench.run(mergebench.plan(recipe), tmp_path / "out")
    before, after, v = read_model(model), read_model(tmp_path / "out"), load_file(probe)["weight"][1]

    for name, tensor in before.items():
        if "down_proj" in name:  # what neurons write: columns
            torch.testing.assert_close(after[name].T @ v, -(tensor.T @ v), rtol=0, atol=1e-4)
            torch.testing.assert_close(
                tensor - 2 * torch.outer(v, v @ tensor) / (v @ v), after[name], rtol=0, atol=1e-5
            )
        else:
            assert torch.equal(tensor, after[name])


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The page's edit as an installed package: a module and its entry point."""
    site, info = tmp_path / "site", tmp_path / "site" / "my_merges-1.0.dist-info"
    info.mkdir(parents=True)
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "@edit" in block)
    (site / "my_merges.py").write_text(code, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-merges\nVersion: 1.0\n", encoding="utf-8")
    (entry,) = re.findall(r"group `mergebench\.edits` \(`(.*?)`\)", PAGE)
    (info / "entry_points.txt").write_text(f"[mergebench.edits]\n{entry}\n".replace('"', ""), encoding="utf-8")
    return site


@pytest.mark.slow
def test_the_edit_of_the_page_from_the_command_line(package: Path, tmp_path: Path, shell: Cli) -> None:
    """Its parameters are options, with its help and range; those of another edit are refused in one line."""
    write_model(tmp_path / "model", gated(torch.float32), config=CONFIG)
    write_probe(tmp_path / "p.safetensors", torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(7)))
    command = ["edit", "--model", "model", "--probe", "p.safetensors", "--edit", "reflect"]

    def run(*more: str) -> Ran:
        path = f"{package}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        return shell(*command, "--out", "out", *more, cwd=tmp_path, PYTHONPATH=path, COLUMNS="200")

    shown = run("--help")
    assert shown.code == 0 and "--rows" not in shown.out
    for text in (
        "Options of reflect",
        "--strength",
        "Share of the way to the mirror image, at least 0, at most 1. De",
    ):
        assert text in shown.out
    for wrong, says in (
        (["--rows", "3"], "error: --rows: reflect has no such option"),
        (["--strength", "2"], "error: --strength: must be at least 0, at most 1, got 2"),
        (["--strength", "some"], "error: --strength: must be a number, at least 0, at most 1, got 'some'"),
    ):
        refused = run(*wrong)
        assert (refused.code, refused.out) == (2, "") and refused.err.splitlines()[0] == says
        assert len(refused.err.splitlines()) == 2 and not (tmp_path / "out").exists()
    assert run("--strength", "0.5").code == 0
    before, after = read_model(tmp_path / "model"), read_model(tmp_path / "out")
    v = load_file(tmp_path / "p.safetensors")["weight"][1]
    for name, tensor in before.items():
        taken = torch.outer(v, v @ tensor) / (v @ v) if "down_proj" in name else torch.zeros(())
        torch.testing.assert_close(tensor - taken, after[name], rtol=0, atol=1e-5)
