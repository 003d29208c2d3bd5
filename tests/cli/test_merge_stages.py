"""Merges in several stages on the command line: what is made, printed, reused and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from models import fine_tuned, names, read_model, tiny_tensors, write_model
from torch import Tensor

import mergebench
from mergebench.recipe.stages import check_stages
from tests.conftest import Cli

Tensors = dict[str, Tensor]
RECIPE = """
merge_method: linear
models: [{model: pair}, {model: c}]
dtype: float32
---
name: pair
merge_method: linear
models:
  - model: a
  - model: b
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Tensors]:
    """a, b, c and a recipe that halves the way between c and the mean of a and b."""
    monkeypatch.chdir(tmp_path)
    tensors = [fine_tuned(tiny_tensors(), seed) for seed in range(3)]
    for name, one in zip("abc", tensors, strict=True):
        write_model(Path(name), one)
    Path("recipe.yaml").write_text(RECIPE)
    return tensors


def check(place: str, models: list[Tensors]) -> None:
    found = read_model(Path(place))
    for name, value in found.items():
        a, b, c = (one[name] for one in models)
        if value.is_floating_point():
            assert torch.allclose(value, (a + b) / 4 + c / 2, atol=1e-6)


def test_merge(models: list[Tensors], cli: Cli) -> None:
    code, out, err = cli("merge", "recipe.yaml")
    assert (code, out) == (0, "merged/recipe\n")
    first, *rest = err.splitlines()
    assert re.fullmatch(r"stage pair: merged/recipe\.stages/pair: wrote it in \d+\.\d s", first)
    assert [line.split()[0] for line in rest] == ["linear:", "wrote", "to", "hf"]
    check("merged/recipe", models)
    provenance = json.loads(Path("merged/recipe.stages/pair/mergebench.json").read_text())
    assert provenance["recipe"]["name"] == "pair"
    assert [entry["model"] for entry in provenance["recipe"]["models"]] == ["a", "b"]
    assert names(Path("merged")) == ["recipe", "recipe.stages"]


def test_resume_uses_what_is_finished(models: list[Tensors], cli: Cli) -> None:
    assert cli("merge", "recipe.yaml", "--out", "o").code == 0
    stage = Path("o.stages/pair/model.safetensors")
    before = stage.stat().st_ino
    assert cli("merge", "recipe.yaml", "--out", "o", "--resume") == (
        0,
        "o\n",
        "stage pair: o.stages/pair: already finished\n"
        + cli("merge", "recipe.yaml", "--out", "o", "--resume").err.split("\n", 1)[1],
    )
    assert stage.stat().st_ino == before
    code, _, err = cli("merge", "recipe.yaml", "--out", "o")
    assert code == 2 and err.startswith("error: o.stages/pair: it holds a finished stage\nhint: use it with --resume")
    write_model(Path("b"), fine_tuned(tiny_tensors(), 7))
    assert cli("merge", "recipe.yaml", "--out", "o", "--resume").code == 2
    assert cli("merge", "recipe.yaml", "--out", "o", "--overwrite").code == 0
    check("o", [models[0], fine_tuned(tiny_tensors(), 7), models[2]])


def test_json(models: list[Tensors], cli: Cli) -> None:
    code, out, err = cli("merge", "recipe.yaml", "--out", "o", "--json")
    document = json.loads(out)
    assert (code, err, document["out"]) == (0, "", "o")
    assert [(one["name"], one["out"]) for one in document["earlier_stages"]] == [("pair", "o.stages/pair")]
    Path("recipe.yaml").write_text(RECIPE.split("---")[1])
    assert "earlier_stages" not in json.loads(cli("merge", "recipe.yaml", "--out", "single", "--json").out)


@pytest.mark.parametrize("command", ["plan", "explain"])
def test_before_and_after_the_first_stage(models: list[Tensors], cli: Cli, command: str) -> None:
    code, out, _ = cli(command, "recipe.yaml")
    lines = out.splitlines()
    assert code == 0 and lines[0] == "stage pair:" and lines[1].startswith("linear")
    assert lines[-1] == "the result: waits for pair, not merged yet"
    document = json.loads(cli(command, "recipe.yaml", "--json").out)
    assert document["waits_for"] == ["pair"] and document["earlier_stages"][0]["name"] == "pair"
    assert document["earlier_stages"][0]["method"] == "linear"
    stages = mergebench.load_stages("recipe.yaml")
    mergebench.run(mergebench.plan(stages[0].recipe), stages[0].out)
    out = cli(command, "recipe.yaml").out
    assert "waits" not in out and "the result:" in out
    document = json.loads(cli(command, "recipe.yaml", "--json").out)
    assert document["method"] == "linear" and "waits_for" not in document


def test_what_is_missing_shows_before_the_first_stage(models: list[Tensors], cli: Cli) -> None:
    Path("recipe.yaml").write_text(RECIPE.replace("model: c", "model: ./nowhere"))
    code, _, err = cli("merge", "recipe.yaml")
    assert code == 3 and err.startswith("error: recipe.yaml:3:26: model './nowhere': no such file")
    base = RECIPE.replace("models: [{model: pair}, {model: c}]", "base_model: c\nmodels: [{task_vector: ./nowhere}]")
    Path("recipe.yaml").write_text(base.replace("name: pair", "name: x").replace("base_model: c", "base_model: x"))
    code, _, err = cli("merge", "recipe.yaml")
    assert code == 3 and err.startswith("error: recipe.yaml:4:11: model './nowhere': no such file")
    Path("recipe.yaml").write_text(RECIPE)
    Path("taken").mkdir()
    Path("taken/file").touch()
    assert cli("merge", "recipe.yaml", "--out", "taken").err.startswith("error: taken: it exists and mergebench did")
    assert cli("merge", "recipe.yaml", "--out", "taken", "--resume").code == 2
    assert not Path("merged").exists() and not Path("taken.stages").exists()


def test_a_directory_that_mergekit_wrote(models: list[Tensors], cli: Cli) -> None:
    Path("kit").mkdir()
    Path("kit/mergekit_config.yml").write_text(RECIPE)
    for command in ("plan", "explain"):
        assert cli(command, "kit").code == 0
    assert cli("merge", "kit", "-q") == (0, "merged/kit\n", "")
    check("merged/kit", models)


def test_from_python(models: list[Tensors]) -> None:
    for stage in mergebench.load_stages("recipe.yaml", "o"):
        result = mergebench.run(mergebench.plan(stage.recipe), stage.out, resume=True)
    check(str(result.out), models)
    check_stages(mergebench.load_stages("recipe.yaml", "o"), resume=True)
