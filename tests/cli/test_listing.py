"""What lists, explains and begins: `methods`, `init`, `--help`; none of them waits for torch."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from models import fine_tuned, tiny_tensors, write_model, write_statistics

import mergebench
from mergebench import methods
from mergebench.engine.method import GROUPS
from tests.conftest import Cli

DOCS = Path(__file__).parents[2] / "docs"
AFTER = """
import sys
from mergebench.cli import main
try:
    main()
except SystemExit:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize("words", ["--help", "methods", "methods tsv_m --json", "merge --help", "init pcb"])
def test_torch_is_not_imported(words: str) -> None:
    command = [sys.executable, "-c", AFTER, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_what_was_listed_works_afterwards() -> None:
    """A module that was imported without torch finds it when it is used."""
    code = """
import sys
from mergebench.cli.lazy import torch_later
with torch_later():
    from mergebench.methods import get
    ties, sce = get("ties"), get("sce")
assert "torch" not in sys.modules
from mergebench.testing import check_method
print(check_method(ties, density=0.5))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("ties keeps the rules: "), done.stderr


def test_groups_are_those_of_the_page(cli: Cli) -> None:
    """docs/methods.md, the list and --json put every method in the same place."""
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^## ([\w ]+)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))
    documented = {
        name: group
        for group in GROUPS
        for line in parts[group].splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    listed, group = {}, ""
    for line in cli("methods").out.splitlines():
        if line and not line.startswith(" "):
            group = line.partition(":")[0]
        elif line.strip() and group in GROUPS:
            listed[line.split()[0]] = group
    found = {one["name"]: one["group"] for one in json.loads(cli("methods", "--json").out) if one["kind"] == "method"}
    assert documented == listed == found == {name: methods.get(name).group for name in methods.names()}


@pytest.mark.parametrize("name", methods.names())
def test_every_method_shows_its_formula(name: str) -> None:
    summary, formula, *text = (inspect.getdoc(methods.get(name).function) or "").split("\n\n")
    assert summary.endswith(".") and text
    lines = formula.splitlines()
    assert all(line.startswith("    ") and len(line) <= 84 for line in lines)
    assert any(re.match(r"    theta(_i)? = ", line) for line in lines)


def test_the_default_of_ties_is_said(cli: Cli) -> None:
    out = " ".join(cli("methods", "ties").out.split())
    assert "The default density of 1 trims nothing, as in mergekit" in out
    assert methods.get("ties").parameters["density"].default == 1


@pytest.mark.parametrize("name", methods.names())
def test_a_recipe_to_start_from(name: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It plans once the models are there; with all that is commented out, too."""
    monkeypatch.chdir(tmp_path)
    base = tiny_tensors()
    for number, place in enumerate(("BASE", "MODEL", "MODEL_1", "MODEL_2")):
        write_model(Path(place), fine_tuned(base, number))
        if methods.get(name).statistics is not None and place[-1].isdigit():
            write_statistics(Path(f"STATISTICS_{place[-1]}"), name, Path(place))
    code, out, err = cli("init", name)
    assert (code, err) == (0, "")
    Path("recipe.yaml").write_text(out)
    plan = mergebench.plan("recipe.yaml")
    assert plan.merge.method.name == name
    defaults = mergebench.load("recipe.yaml").parameters
    shown = re.sub(r"^#   |^# (?=parameters:)", lambda found: "  " if found[0] == "#   " else "", out, flags=re.M)
    Path("shown.yaml").write_text(shown)
    assert mergebench.load("shown.yaml").parameters == defaults | {
        key: None for key, one in methods.get(name).parameters.items() if one.default is None and key in defaults
    } or set(defaults) <= set(mergebench.load("shown.yaml").parameters)


def test_the_models_are_filled_in(cli: Cli) -> None:
    lines = cli("init", "ties", "org/base", "a+b", "weird name", "d").out.splitlines()
    assert "base_model: org/base  # what the others were fine-tuned from" in lines
    assert [line for line in lines if "- model:" in line] == [
        "  - model: a+b",
        '  - model: "weird name"',
        "  - model: d",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("slerp a b c", "'slerp' takes 2 models, got 3"),
        ("nearswap base a b", "'nearswap' takes 1 model beside the base, got 2"),
        ("passthrough a b", "'passthrough' takes 1 model, got 2"),
    ],
)
def test_more_models_than_a_method_takes(words: str, said: str, cli: Cli) -> None:
    code, out, err = cli("init", *words.split())
    assert (code, out, err) == (2, "", f"error: {said}\n")
