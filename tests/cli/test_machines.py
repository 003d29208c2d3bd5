"""What programs read: errors as JSON, where a plan would write; and what a Python prompt shows."""

from __future__ import annotations

import ast
import json
import logging
from pathlib import Path

import pytest

import mergebench
from mergebench.evaluation import Results, save
from tests.conftest import Cli
from tests.evaluation.page import documents
from tests.models import tiny_tensors, write_model, write_recipe


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("first", "second")):
        write_model(Path(name), tiny_tensors(number))
    write_recipe(Path("recipe.yaml"), "linear", ["first", "second"])


def test_an_error_is_a_document_with_its_place(cli: Cli) -> None:
    Path("wrong.yaml").write_text("merge_method: linear\nmodels:\n  - modl: first\n")
    ran = cli("plan", "wrong.yaml", "--json")
    (error,) = json.loads(ran.out).values()
    assert (ran.code, error["exit_code"]) == (2, 2)
    assert error["place"] == {"file": "wrong.yaml", "line": 3, "column": 5}
    assert ran.err == f"error: {error['message']}\nhint: {error['hint']}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", "--json"], 2, "Missing argument"),
        (["plan", "recipe.yaml", "--jsn", "--json"], 2, "No such option"),
        (["plan", "none.yaml", "--json"], 2, "none.yaml"),
        (["inspect", "none", "--json"], 3, "model 'none': no such file or directory"),
    ],
)
def test_every_kind_of_error_is_a_document(cli: Cli, arguments: list[str], code: int, message: str) -> None:
    ran = cli(*arguments)
    error = json.loads(ran.out)["error"]
    assert (ran.code, error["exit_code"], error["place"]) == (code, code, None)
    assert message in error["message"]


def test_without_json_an_error_leaves_stdout_empty(cli: Cli) -> None:
    assert cli("inspect", "none").out == ""


def test_a_plan_says_where_it_would_write_and_what(cli: Cli) -> None:
    found = json.loads(cli("plan", "recipe.yaml", "--out", "there", "--json").out)
    assert (found["out"], found["base"], found["dtypes"]) == ("there", None, ["F32", "I64"])
    assert not Path("there").exists()


def test_the_output_may_stand_where_mergekit_has_it(cli: Cli) -> None:
    assert cli("merge", "recipe.yaml", "merged/mine", "-q").out == "merged/mine\n"
    assert Path("merged/mine/mergebench.json").is_file()
    ran = cli("merge", "recipe.yaml", "one", "--out", "other")
    assert (ran.code, ran.err.splitlines()[0]) == (2, "error: 'one' and --out other: two output directories")


def test_a_misspelt_model_is_answered_by_its_neighbour(cli: Cli) -> None:
    Path("models").mkdir()
    Path("first").rename("models/first")
    for typed, hint in (("models/frist", "models/first"), ("secnd", "second")):
        ran = cli("inspect", typed)
        assert (ran.code, ran.err.splitlines()[1]) == (3, f"hint: did you mean '{hint}'?")
    assert cli("inspect", "nothing").err.splitlines()[1] == "hint: a hub model is written org/name"


def test_a_prompt_shows_names_and_short_values() -> None:
    assert {"load", "plan", "run", "evaluate", "compare"} <= set(dir(mergebench))
    plan = mergebench.plan(mergebench.load("recipe.yaml"))
    assert repr(plan) == f"<Plan: linear of 2 models, {plan.elements:,} elements, 1 sweep>"
    assert repr(plan.merge.models[0]) == f"<Model first: {len(plan.merge.models[0].tensors)} tensors>"
    assert Path(mergebench.__file__).with_name("py.typed").is_file()
    assert repr(mergebench.run(plan, "out")) == f"Result(out={Path('out')!r}, already_done=False)"
    Path("measured").mkdir()
    save(results := documents.results(), Path("measured"))
    assert repr(results) == repr(Results.load("measured")) == "<Results: 5 models on 3 tasks>"
    assert len(repr(results.records[0])) < 300
    assert "Prediction" not in repr(mergebench.compare("base", "pcb", "measured"))


def test_a_program_reads_the_log(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """What is read, decided and written goes through `logging`; the library prints nothing."""
    write_recipe(Path("noted.yaml"), "linear", ["first", "second"], parameters={"int8_mask": True})
    with caplog.at_level(logging.DEBUG, logger="mergebench"):
        plan = mergebench.plan(mergebench.load("noted.yaml"))
        mergebench.run(plan, "out")
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert {record.name.split(".")[0] for record in caplog.records} == {"mergebench"}
    assert plan.merge.notes and [("INFO", f"note: {note}") for note in plan.merge.notes] == said[2:-3]
    assert said[:2] == [("DEBUG", "opening first"), ("DEBUG", "opening second")]
    assert said[-1] == ("INFO", "wrote out")
    assert capfd.readouterr() == ("", "")


def test_only_the_command_line_prints() -> None:
    package = Path(mergebench.__file__).parent
    for file in package.rglob("*.py"):
        if "cli" not in file.relative_to(package).parts:
            calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
            assert "print" not in [call.id for call in calls if isinstance(call, ast.Name)], file
