"""The worked example of docs/plugins.md, run as a reader would: defined, proved, shipped, merged with.

python -m pytest tests/docs
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The page's code as an installed package: a module and its entry point."""
    site = tmp_path / "site"
    info = site / "my_merges-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "my_merges.py").write_text(blocks("python")[0], encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-merges\nVersion: 1.0\n", encoding="utf-8")
    entry = blocks("toml")[0].split('"mergebench.methods"]\n')[1].replace('"', "")
    (info / "entry_points.txt").write_text(f"[mergebench.methods]\n{entry}", encoding="utf-8")
    return site


def run(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mergebench", *arguments]
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_the_example_proves_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the page merges, and writes a file of deltas
    for number, name in enumerate(("base", "a", "b")):
        Path(name).mkdir()
        save_file({"w": torch.arange(4.0) * number}, Path(name) / "model.safetensors")
    page: dict[str, object] = {"__name__": "page"}
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), page)


def test_the_example_ships_and_merges(package: Path, tmp_path: Path) -> None:
    base = {"w": torch.zeros(4)}
    save_file(base, tmp_path / "base.safetensors")
    save_file({"w": torch.tensor([3.0, 0, 0, 0])}, tmp_path / "a.safetensors")
    save_file({"w": torch.tensor([0, 1.0, 0, 0])}, tmp_path / "b.safetensors")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: equal_length\nbase_model: {tmp_path}/base.safetensors\n"
        f"models: [{{model: {tmp_path}/a.safetensors}}, {{model: {tmp_path}/b.safetensors}}]\n",
        encoding="utf-8",
    )

    listed = run(package, "methods", "equal_length")
    done = run(package, "merge", str(recipe), "--out", str(tmp_path / "out"), "-q")

    assert "my-merges" in listed.stdout
    assert done.returncode == 0, done.stderr
    merged = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert torch.equal(torch.tensor([1.0, 1.0, 0, 0]), merged)


def test_plugins_can_be_turned_off(package: Path) -> None:
    done = run(package, "methods", "equal_length", MERGEBENCH_PLUGINS="")

    assert done.returncode == 2
    assert "no method is called 'equal_length'" in done.stderr
