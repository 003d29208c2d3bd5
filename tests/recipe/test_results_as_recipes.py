"""The directory of a result, and stdin, are recipes; what other tools' configs mean is said."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from models import fine_tuned, read_model, tiny_tensors, write_model

import mergebench
from mergebench.errors import RecipeError
from tests.conftest import Cli

TIES = "merge_method: ties\nbase_model: ../base\nmodels: [{model: ../a}, {model: ../b}]\nparameters: {density: 0.5}\n"


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("base"), tiny_tensors())
    for number, name in enumerate("ab"):
        write_model(Path(name), fine_tuned(tiny_tensors(), number))
    Path("mine").mkdir()
    Path("mine/ties.yaml").write_text(TIES)


def test_a_result_is_merged_again_from_anywhere(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its relative paths lead from where they led, also where both the recipe's and the working directory did."""
    write = TIES.replace("../a", "a")  # from the working directory; the others from the recipe's
    Path("mine/ties.yaml").write_text(write)
    assert cli("merge", "mine/ties.yaml", "--out", "out", "-q").code == 0
    wanted = read_model(Path("out"))
    Path("far/away").mkdir(parents=True)
    monkeypatch.chdir("far/away")

    assert "to merged/out\n" in cli("plan", "../../out").out
    code, _, err = cli("merge", "../../out", "--out", "again", "-q")

    assert code == 0, err
    got = read_model(Path("again"))
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in got)
    assert mergebench.load("again").parameters["density"] == 0.5
    assert cli("plan", "again", "--set", "parameters.density=0.1", "--json").code == 0


def test_results_that_no_recipe_made(cli: Cli) -> None:
    assert cli("task-vector", "a", "--base", "base", "--out", "tv").code == 0
    code, out, err = cli("plan", "tv")
    assert (code, out) == (2, "")
    assert err == "error: tv: it was not made by a recipe alone\nhint: name the file of a recipe\n"


def test_stdin(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def given(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    given(TIES.replace("../", ""))
    assert cli("plan", "-").out.startswith("ties (arXiv:2306.01708), scope tensor\n")
    given("merge_method: ties\nmodels: [\n")
    assert cli("plan", "-").err.startswith("error: stdin:3:1: not valid YAML: ")
    given(TIES.replace("density", "densty"))
    assert cli("merge", "-").err.startswith("error: stdin:4:14: parameters.densty: ")


@pytest.mark.parametrize("key", ["gate_mode: hidden", "experts: [{source_model: a}]"])
def test_a_mixture_of_experts_is_another_tool(key: str) -> None:
    Path("moe.yaml").write_text(f"base_model: base\n{key}\n")
    with pytest.raises(RecipeError, match=r"moe.yaml:2:1: .*mergekit-moe") as caught:
        mergebench.load("moe.yaml")
    assert "make the mixture with mergekit-moe" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("density=0.2", "did you mean --set parameters.density=VALUE?"),
        ("models.0.weight=0.2", "did you mean --set models.0.parameters.weight=VALUE?"),
    ],
)
def test_set_without_parameters(option: str, hint: str) -> None:
    with pytest.raises(RecipeError, match="'ties' takes it as a parameter") as caught:
        mergebench.load("mine/ties.yaml", [option])
    assert caught.value.hint == hint


def test_the_case_of_a_name_does_not_matter_to_the_hint() -> None:
    wrong: dict[str, Any] = {"merge_method": "TIES", "models": [{"model": "a"}]}
    with pytest.raises(RecipeError) as caught:
        mergebench.load(wrong)
    assert caught.value.hint == "did you mean 'ties'?"
