"""Who measures leaves a page; and where none can be made, everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mergebench.errors import RunError
from mergebench.evaluation import page
from mergebench.evaluation.page import profile
from tests.cli.test_evaluate import place
from tests.conftest import Cli

__all__ = ["place"]


@pytest.mark.parametrize("way", ["-q", "--json"])
def test_merge_leaves_page_and_statistics(place: Path, cli: Cli, way: str) -> None:
    done = cli(
        "merge", "recipe.yaml", "--set", "merge_method=ties", "--set", "parameters.density=0.5", "--out", "out", way
    )
    assert done.code == 0, done.err
    text = (place / "out" / "report.html").read_text(encoding="utf-8")
    assert "Layer by layer" in text and "Not drawn" not in text
    statistics = json.loads((place / "out" / "statistics.json").read_text())
    kept = json.loads((place / "out" / "mergebench.json").read_text())["kept"]
    numel = sum(tensor["numel"] for tensor in statistics["tensors"])
    for number, model in enumerate("xy"):  # never more than what the trim left: the vote comes after it
        assert 0 < sum(tensor["kept"][number] for tensor in statistics["tensors"]) / numel < kept[model]


def test_eval_leaves_a_page(place: Path, cli: Cli) -> None:
    assert cli("eval", "suite.yaml", "base", "x", "--against", "base", "-q").code == 0
    text = (place / "evaluations" / "suite" / "report.html").read_text(encoding="utf-8")
    assert "Flips against base" in text and "Not drawn" not in text
    weights = (place / name / "model.safetensors" for name in ("base", "x"))
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in weights]
    found = json.loads((place / "evaluations" / "suite" / "evaluation.json").read_text())["made"]["bytes"]
    assert found == dict(zip(("base", "x"), sizes, strict=True))


def test_without_a_page_the_rest_is_there(place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr(profile, "profile", broken)
    monkeypatch.setattr(page, "render", broken)
    done = cli("merge", "recipe.yaml", "--out", "out")
    assert done.code == 0
    assert "linear" in done.out
    assert "wrote out/evaluation.json, evaluation.md" in done.err.splitlines()
    assert not {"report.html", "statistics.json"} & {path.name for path in (place / "out").iterdir()}
